"""iGPT: a GPT over the pixels of a small image (Chen et al. 2020, "Generative Pretraining from Pixels").

The file follows the paper (V2, section 2) and the released code where the two differ: RMS norm with a
gain only, x * sigmoid(1.702 x), no bias anywhere, no dropout, an output head of its own.

Shapes: B batch, T tokens (resolution * resolution, raster order), D width (n_embd), H heads,
K head width (D / H), V palette size (n_vocab), L blocks (n_layer), C classes (n_classes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.models.contract import POOLS, ModelConfig, block_inputs, check_attention, check_features


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * g over the last axis; no mean is subtracted and there is no bias."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return F.rms_norm(x, self.g.shape, self.g, eps=1e-5)


class Attention(nn.Module):
    """Dense self-attention, causal for the AR objective, both ways for BERT; scale 1 / sqrt(K)."""

    def __init__(self, n_embd: int, n_head: int, causal: bool):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)  # rows: query, key, value
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, K)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))

    def probabilities(self, x: Tensor) -> Tensor:
        """With which probability each place looks at each, (B, T, D) -> (B, H, T, T): the plain formula."""
        B, T, D = x.shape
        q, k, _ = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / math.sqrt(D // self.n_head)
        if self.causal:
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        return logits.softmax(dim=-1)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the GELU approximation of the released code."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """D -> 4 D -> D around `quick_gelu`."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.c_proj(quick_gelu(self.c_fc(x)))


class Block(nn.Module):
    """n = norm(h);  a = h + attention(n);  h' = a + mlp(norm(a))   (section 2.2)."""

    def __init__(self, n_embd: int, n_head: int, causal: bool):
        super().__init__()
        self.ln_1 = RMSNorm(n_embd)
        self.attn = Attention(n_embd, n_head, causal)
        self.ln_2 = RMSNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, h: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        h = h + self.attn(self.ln_1(h))
        return h + self.mlp(self.ln_2(h))

    def normed(self, h: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """The normed input alone, n: what features and class heads read."""
        return self.ln_1(h)


@dataclass(frozen=True)
class IGPTConfig(ModelConfig):
    """Everything that decides the architecture. `objective` is "ar" (next pixel) or "bert" (masked pixel).

    n_classes: C of the class head that fine-tuning adds; None for a model without one. head_layer: which of the layers
    0..L it reads; None stands for L, the final norm.
    """

    n_layer: int
    n_head: int
    n_embd: int
    resolution: int = 32
    n_vocab: int = 512
    objective: str = "ar"
    n_classes: int | None = None
    head_layer: int | None = None

    def __post_init__(self):
        self.check_whole("n_layer", "n_head", "n_embd", "resolution", "n_vocab")
        self.check_classes()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads")
        if self.objective not in ("ar", "bert"):
            raise ValueError(f"objective is {self.objective!r}, expected 'ar' or 'bert'")
        if self.n_classes is None and self.head_layer is not None:
            raise ValueError(f"head_layer is {self.head_layer!r}, and there is no head: n_classes is not given")
        if self.n_classes is not None:
            if self.head_layer is None:
                object.__setattr__(self, "head_layer", self.n_layer)
            if self.head_layer not in range(self.n_layer + 1):
                raise ValueError(f"head_layer is {self.head_layer!r}, expected one of 0 to {self.n_layer}")

    @property
    def n_ctx(self) -> int:
        """Tokens in one image, T."""
        return self.resolution**2


class IGPT(nn.Module):
    """The pixel transformer for both objectives.

    AR: position i sees sos and pixels 1..i-1 and predicts pixel i, so the last pixel is never an input.
    BERT: there is no sos; masked pixels keep only their position embedding and are predicted from all others.
    """

    input_kind = "tokens"

    def __init__(self, config: IGPTConfig):
        super().__init__()
        self.config = config
        c, causal = config, config.objective == "ar"
        self.wte = nn.Embedding(c.n_vocab, c.n_embd)
        self.wpe = nn.Parameter(torch.empty(c.n_ctx, c.n_embd))
        if causal:
            self.sos = nn.Parameter(torch.empty(c.n_embd))
        self.h: Any = nn.ModuleList(Block(c.n_embd, c.n_head, causal) for _ in range(c.n_layer))
        self.ln_f = RMSNorm(c.n_embd)
        self.wtet = nn.Linear(c.n_embd, c.n_vocab, bias=False)
        if c.n_classes:
            self.wclf = nn.Linear(c.n_embd, c.n_classes, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values of the released code (normal, by standard deviation).

        | tensor                    | std                     |
        |---------------------------|-------------------------|
        | wte, sos                  | 0.02                    |
        | wpe                       | 0.01                    |
        | query, key, value         | 1 / sqrt(D)             |
        | attention c_proj          | 1 / sqrt(D L)           |
        | MLP c_fc, c_proj          | 0.02                    |
        | wtet                      | 0: first loss is ln V   |
        | wclf                      | 0: first loss is ln C   |
        | gains g                   | all 1                   |
        """
        D, L = self.config.n_embd, self.config.n_layer
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe, std=0.01)
        if self.config.objective == "ar":
            nn.init.normal_(self.sos, std=0.02)
        for block in self.h:
            nn.init.ones_(block.ln_1.g)
            nn.init.ones_(block.ln_2.g)
            nn.init.normal_(block.attn.c_attn.weight, std=1 / math.sqrt(D))
            nn.init.normal_(block.attn.c_proj.weight, std=1 / math.sqrt(D * L))
            nn.init.normal_(block.mlp.c_fc.weight, std=0.02)
            nn.init.normal_(block.mlp.c_proj.weight, std=0.02)
        nn.init.ones_(self.ln_f.g)
        nn.init.zeros_(self.wtet.weight)
        if self.config.n_classes:
            nn.init.zeros_(self.wclf.weight)

    @property
    def n_layers(self) -> int:
        """L. Features exist for the layers 0..L: the normed input of block l, and the final norm at L."""
        return self.config.n_layer

    @property
    def blocks(self) -> nn.ModuleList:
        """The L blocks, each a map (B, T, D) -> (B, T, D)."""
        return self.h

    def embed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What enters block 0: (B, T) int64 in [0, V) -> (B, T, D).

        `mask` (B, T) bool is for BERT alone: where it is true the content embedding is zeroed.
        """
        x = self.wte(tokens)
        if self.config.objective == "ar":
            if mask is not None:
                raise ValueError("a mask belongs to the BERT objective; this model is autoregressive")
            x = torch.cat((self.sos.expand(len(x), 1, -1), x[:, :-1]), dim=1)
        elif mask is not None:
            x = x.masked_fill(mask[..., None], 0)
        return x + self.wpe

    def hidden(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output of the final norm, (B, T, D). Arguments as for `embed`."""
        h = self.embed(tokens, mask)
        for block in self.h:
            h = block(h)
        return self.ln_f(h)

    def hidden_and_classes(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output of the final norm, (B, T, D), and class logits (B, C) float32, from one pass (section 2.3).

        The class head is linear on the mean over positions of its layer's normed values, as `features` gives them; it
        computes in float32. Arguments as for `embed`; only a model with a class head has classes.
        """
        h, layer = self.embed(tokens, mask), self.config.head_layer
        for i, block in enumerate(self.h):
            if i == layer:
                read = block.normed(h)
            h = block(h)
        hidden = self.ln_f(h)
        mean = POOLS["mean"]((hidden if layer == len(self.h) else read).float())  # (B, D)
        with torch.autocast(mean.device.type, enabled=False):
            return hidden, self.wclf(mean)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); those at position i predict pixel i. Arguments as for `embed`."""
        return self.wtet(self.hidden(tokens, mask))

    def features(
        self, tokens: Tensor, layers: Iterable[int], pool: str = "mean", mask: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Features for a linear probe (section 2.4), from one pass that stops after the deepest requested layer.

        Layer l < L is n^l, the normed input of block l; layer L is the output of the final norm.

        Args:
            tokens: (B, T) int64 in [0, V).
            layers: which of 0..L.
            pool: "mean" or "max" over positions, "quadrants" (B, 4 D), "last" position, or "none" for (B, T, D).
            mask: (B, T) bool, for BERT models.

        Returns:
            {layer: (B, D)}, in rising order of layer.

        Raises:
            ValueError: a layer outside 0..L, or an unknown `pool`.
        """
        requested = check_features(layers, self.n_layers, pool, last=True)
        norms = [*(block.normed for block in self.h), self.ln_f]
        entering = block_inputs(self.embed(tokens, mask), self.h, requested)
        return {layer: POOLS[pool](norms[layer](h)) for layer, h in entering}

    def attention(self, tokens: Tensor, layers: Iterable[int], mask: Tensor | None = None) -> dict[int, Tensor]:
        """With which probability each pixel looks at each, from one pass that stops at the deepest layer.

        Args:
            tokens, mask: as for `features`.
            layers: which of the blocks 0..L - 1.

        Returns:
            {layer: (B, H, T, S)}, in raster order, each row a distribution over the S keys. BERT: S = T. AR: S = T + 1;
            the query of a pixel is the place that predicts it, the keys are sos and then the pixels. A pixel that is
            not before the query has probability 0.

        Raises:
            ValueError: a layer outside 0..L - 1.
        """
        requested = check_attention(layers, self.n_layers)
        shown = (0, int(self.config.objective == "ar"))  # the last pixel is never an input
        out = {}
        for layer, h in block_inputs(self.embed(tokens, mask), self.h, requested):
            block = self.h[layer]
            out[layer] = F.pad(block.attn.probabilities(block.normed(h)), shown)
        return out
