"""Self-attention that can be a convolution (Cordonnier, Loukas, Jaggi 2020, "On the Relationship between Self-Attention
and Convolutional Layers").

The model of the paper's experiments: nine heads, each with a Gaussian over the offset from query to key, of which
centre and width are learned; or learned vectors for each offset, with or without content. Sizes follow the released
code. Norms stand behind the residual sums, as in BERT.

Shapes: B batch, R resolution, n x n positions (T in all), D width, N heads, L blocks, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.models.contract import ModelConfig, RGBModel, block_inputs, check_attention

#: What the logits are made of.
POSITIONS = ("quadratic", "general", "learned", "learned+content")


def offsets(n: int, device: torch.device | None = None) -> Tensor:
    """(2n - 1, 2n - 1, 2): rows and columns from query to key, -(n - 1) to n - 1."""
    at = torch.arange(1 - n, n, device=device)
    return torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1)


def by_pair(logits: Tensor, n: int) -> Tensor:
    """From a logit for each offset, (N, 2n - 1, 2n - 1), to one for each query and key, (N, T, T)."""
    at = torch.arange(n, device=logits.device)
    between = at - at[:, None] + n - 1  # (n, n): key minus query, counted from 0
    pairs = logits[:, between[:, None, :, None], between[None, :, None, :]]  # (N, n, n, n, n)
    return pairs.reshape(len(logits), n * n, n * n)


class QuadraticPositions(nn.Module):
    """A Gaussian over offsets for each head: logit -alpha |delta - centre|^2, with alpha = s^2 / 2 (section 3).

    It is the product of (|delta|^2, delta_1, delta_2) and -alpha (1, -2 centre_1, -2 centre_2), less what is the same
    for all keys. With `general` it is -|S' (delta - centre)|^2 / 2, so that S S' is the inverse of the covariance.
    """

    centre: Tensor
    s: Tensor

    def __init__(self, num_heads: int, general: bool = False, fixed: bool = False):
        """`fixed`: centres and widths are not trained."""
        super().__init__()
        values = {"centre": torch.empty(num_heads, 2), "s": torch.empty(num_heads, *((2, 2) if general else ()))}
        for name, value in values.items():
            if fixed:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.general = general

    @torch.no_grad()
    def init_weights(self, centres: str) -> None:
        """Centres normal, std 2, or on a square grid around the query; s = 1, or the identity, and noise of 0.01."""
        if centres == "grid":
            self.centre.copy_(grid(len(self.centre)))
        else:
            nn.init.normal_(self.centre, std=2.0)
        nn.init.normal_(self.s, std=0.01)
        self.s.add_(torch.eye(2) if self.general else 1.0)

    @property
    def covariance(self) -> Tensor:
        """(N, 2, 2): of each head's Gaussian, in squared positions."""
        if self.general:
            return torch.linalg.inv(self.s @ self.s.mT)
        return torch.eye(2, dtype=self.s.dtype, device=self.s.device) / self.s[:, None, None] ** 2

    def forward(self, n: int) -> Tensor:
        """Logits for each offset, (N, 2n - 1, 2n - 1) float32."""
        away = offsets(n, self.centre.device) - self.centre[:, None, None]  # (N, 2n - 1, 2n - 1, 2)
        if self.general:  # no matrix product, which autocast would round: at sharp heads the logits are large
            scaled = (away[..., None] * self.s[:, None, None]).sum(dim=-2)
        else:
            scaled = away * self.s[:, None, None, None]
        return -scaled.square().sum(dim=-1) / 2


def grid(num_heads: int) -> Tensor:
    """(K * K, 2): the offsets of a K x K kernel, row by row.

    Raises:
        ValueError: num_heads is not the square of an odd number.
    """
    K = round(num_heads**0.5)
    if num_heads != K * K or K % 2 == 0:
        raise ValueError(f"{num_heads} heads do not make a square grid around the query; take 1, 9, 25, ...")
    return offsets(K // 2 + 1).reshape(-1, 2).float()


class LearnedPositions(nn.Module):
    """A vector for each offset of rows and of columns, shared by the heads: logit u_row . r_row + u_col . r_col."""

    def __init__(self, num_heads: int, embed_dim: int, n: int):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(2 * n - 1, embed_dim))
        self.columns = nn.Parameter(torch.empty(2 * n - 1, embed_dim))
        self.u_row = nn.Parameter(torch.empty(num_heads, embed_dim))
        self.u_col = nn.Parameter(torch.empty(num_heads, embed_dim))

    def init_weights(self) -> None:
        """Vectors of offsets normal with std 1, those of heads 0.02: the heads begin almost everywhere alike."""
        for r, u in ((self.rows, self.u_row), (self.columns, self.u_col)):
            nn.init.normal_(r)
            nn.init.normal_(u, std=0.02)

    def forward(self, n: int) -> Tensor:
        """Logits for each offset, (N, 2n - 1, 2n - 1)."""
        return (self.u_row @ self.rows.T)[:, :, None] + (self.u_col @ self.columns.T)[:, None, :]


class PositionalAttention(nn.Module):
    """Each head averages whole input vectors with its own probabilities; one linear map takes all N averages.

    That map is value and output matrix of every head in one. Without content the probabilities do not depend on the
    image: they are computed, and in training dropped, once for the batch. With it, q . k / sqrt(D) is added.
    """

    def __init__(
        self, d_in: int, d_out: int, num_heads: int, positions: nn.Module, content: bool = False, drop_rate: float = 0.0
    ):
        super().__init__()
        self.num_heads, self.drop_rate = num_heads, drop_rate
        self.positions: Any = positions
        self.query = nn.Linear(d_in, num_heads * d_in) if content else None
        self.key = nn.Linear(d_in, num_heads * d_in) if content else None
        self.value = nn.Linear(num_heads * d_in, d_out)

    def probabilities(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (N, T, T), query before key; with content (B, N, T, T)."""
        T, D = x.shape[1:]
        n = round(T**0.5)
        logits = by_pair(self.positions(n), n)
        if self.query is not None and self.key is not None:
            q, k = (f(x).unflatten(2, (self.num_heads, D)).transpose(1, 2) for f in (self.query, self.key))
            logits = logits + q @ k.mT / D**0.5
        return logits.softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D_out)
        B, T, D = x.shape
        p = F.dropout(self.probabilities(x), self.drop_rate, self.training).to(x.dtype)
        averages = p.flatten(-3, -2) @ x  # (B, N * T, D)
        return self.value(averages.view(B, self.num_heads, T, D).transpose(1, 2).reshape(B, T, -1))


@torch.no_grad()
def attention_of_convolution(weight: Tensor, alpha: float = 46.0) -> PositionalAttention:
    """The attention that equals a convolution: theorem 1, by the construction of its proof.

    Head h looks at one offset of the kernel, its value matrix is that slice of the kernel, and the heads are summed. At
    alpha 46 what a head sees at other offsets is below the rounding of float64. Softmax must look somewhere: the image
    needs a ring of K // 2 zeros around it to equal a convolution padded with zeros, also at the border.

    Args:
        weight: (D_out, D_in, K, K), K odd, as `torch.nn.functional.conv2d` takes it.
        alpha: sharpness of the Gaussians.

    Returns:
        A layer (B, T, D_in) -> (B, T, D_out) with K * K heads, of the weight's dtype.

    Raises:
        ValueError: the kernel is not square and odd.
    """
    d_out, d_in, K, _ = weight.shape
    if weight.shape[3] != K or K % 2 == 0:
        raise ValueError(f"the kernel is {K} x {weight.shape[3]}; a square one of an odd side was expected")
    positions = QuadraticPositions(K * K, fixed=True)
    made = PositionalAttention(d_in, d_out, K * K, positions).to(weight)
    positions.centre.copy_(grid(K * K))
    positions.s.fill_((2 * alpha) ** 0.5)
    made.value.weight.copy_(weight.permute(0, 2, 3, 1).reshape(d_out, -1))
    made.value.bias.zero_()
    return made


class Block(nn.Module):
    """a = norm(x + dense(attention(x)));  x' = norm(a + mlp(a))."""

    def __init__(self, embed_dim: int, hidden: int, drop_rate: float, attention: PositionalAttention):
        super().__init__()
        self.attn = attention
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-12)
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-12)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        a = self.norm1(x + self.drop(self.dense(self.attn(x))))
        return self.norm2(a + self.drop(self.fc2(F.gelu(self.fc1(a)))))


@dataclass(frozen=True)
class AttentionConvConfig(ModelConfig):
    """Everything that decides the architecture. The defaults are the paper's model for CIFAR-10.

    patch_size: side of the squares of pixels that become one position, in the order row, column, channel; nothing is
        lost, and attention has fewer positions.
    mlp_ratio: width of the MLP in embed_dim: 512 of 400.
    positions: "quadratic", a round Gaussian for each head; "general", one with any covariance; "learned", a vector for
        each offset; "learned+content", with q . k.
    centres: where the Gaussians begin: "random", as in the paper, or "grid", where they are a convolution blurred.
    fixed: whether the Gaussians stay as they begin.
    drop_rate: dropout of hidden values and of attention.
    n_classes: C of the class head; None for a model without one.
    """

    depth: int = 6
    num_heads: int = 9
    embed_dim: int = 400
    mlp_ratio: float = 1.28
    patch_size: int = 2
    positions: str = "quadratic"
    centres: str = "random"
    fixed: bool = False
    drop_rate: float = 0.1
    resolution: int = 32
    n_classes: int | None = None

    def __post_init__(self):
        self.check_whole("depth", "num_heads", "embed_dim", "patch_size", "resolution")
        self.check_classes()
        if self.resolution % self.patch_size:
            raise ValueError(f"resolution {self.resolution} does not divide into patches of side {self.patch_size}")
        self.check_one_of("positions", POSITIONS)
        self.check_one_of("centres", ("random", "grid"))
        gaussian = self.positions in ("quadratic", "general")
        if not gaussian and (self.fixed or self.centres == "grid"):
            raise ValueError(f"fixed and centres are about Gaussians, and positions is {self.positions!r}")
        if self.centres == "grid":
            grid(self.num_heads)
        if round(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio!r}; the MLP would have no width")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate!r}, expected 0 or more and less than 1")

    @property
    def grid_size(self) -> int:
        """Positions of a side, n."""
        return self.resolution // self.patch_size


class AttentionConv(RGBModel):
    """Patches, L blocks of attention by position, the mean over positions, a linear class head."""

    def __init__(self, config: AttentionConvConfig):
        super().__init__()
        self.config = config
        c = config
        self.embed = nn.Linear(3 * c.patch_size**2, c.embed_dim)
        blocks = []
        for _ in range(c.depth):
            if c.positions in ("quadratic", "general"):
                positions: nn.Module = QuadraticPositions(c.num_heads, c.positions == "general", c.fixed)
            else:
                positions = LearnedPositions(c.num_heads, c.embed_dim, c.grid_size)
            content = c.positions == "learned+content"
            attention = PositionalAttention(c.embed_dim, c.embed_dim, c.num_heads, positions, content, c.drop_rate)
            blocks.append(Block(c.embed_dim, round(c.embed_dim * c.mlp_ratio), c.drop_rate, attention))
        self.blocks: Any = nn.ModuleList(blocks)
        if c.n_classes:
            self.head = nn.Linear(c.embed_dim, c.n_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Initial values: linear maps normal with std 0.02 and bias 0, as BERT's; positions as their classes say."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, QuadraticPositions):
                module.init_weights(self.config.centres)
            elif isinstance(module, LearnedPositions):
                module.init_weights()

    @property
    def n_layers(self) -> int:
        """L. Features exist for the layers 0..L: what enters block l, and what leaves the last at L."""
        return self.config.depth

    def patches(self, x: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, T, D): the pixels of each patch by row, column, channel, and a linear map."""
        p = self.config.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, 3, n, p, n, p)
        return self.embed(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))

    def pooled(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, D)
        """The mean over positions of what leaves the last block."""
        h = self.patches(x)
        for block in self.blocks:
            h = block(h)
        return h.mean(dim=1)

    def inputs(self, x: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(layer, (B, T, D)): what enters the blocks."""
        return block_inputs(self.patches(x), self.blocks, layers)

    def normed(self, layer: int, h: Tensor) -> Tensor:
        """What enters the block: the block before it has normed it."""
        return h

    def attention(self, x: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """With which probability each position looks at each: {layer: (B, N, T, T)}, query before key.

        For all positions but "learned+content" it is the same for all images.

        Args:
            x: (B, 3, R, R) float.
            layers: which of the blocks 0..L - 1; a pass stops at the deepest.

        Raises:
            ValueError: a layer outside 0..L - 1.
        """
        requested = check_attention(layers, self.n_layers)
        found = {layer: self.blocks[layer].attn.probabilities(h) for layer, h in self.inputs(x, requested)}
        return {layer: p.expand(len(x), *p.shape[-3:]) for layer, p in found.items()}

    def gaussians(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Where each head looks: {layer: (centres (N, 2), covariances (N, 2, 2))}, key minus query, rows and columns.

        Empty where positions are learned vectors.
        """
        positions = {layer: block.attn.positions for layer, block in enumerate(self.blocks)}
        return {
            layer: (p.centre.detach(), p.covariance.detach())
            for layer, p in positions.items()
            if isinstance(p, QuadraticPositions)
        }
