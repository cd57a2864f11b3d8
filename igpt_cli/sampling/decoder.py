"""An autoregressive IGPT, one pixel after the other; keys and values of earlier pixels are kept, not computed again.

Shapes: B rows (images drawn at a time), T positions, D width, H heads, K = D / H, V palette size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from igpt_cli.models.igpt import IGPT, Block
from igpt_cli.sampling.draw import Chances, draw, require_finite, uniform_dtype

#: On a GPU, attention reads the cache up to the next multiple of this: a CUDA graph is made for each.
BUCKET = 128
#: On a CPU, rows are added up to a multiple of this: a matrix product of fewer rows rounds in another way, and images
#: would depend on how many are drawn.
CPU_ROWS = 8
#: The one fused kernel on a GPU that takes a mask and any length, and what stands in where it cannot.
GPU_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class _Layer:
    """The weights of one block, matrices in the precision of the computation.

    x * sigmoid(1.702 x) is silu(1.702 x) / 1.702, and both factors are in the MLP's matrices: one kernel, not three.
    """

    ln_1: Tensor
    c_attn: Tensor
    attn_c_proj: Tensor
    ln_2: Tensor
    c_fc: Tensor
    mlp_c_proj: Tensor

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> _Layer:
        attn, mlp = block.attn, block.mlp
        matrices = (attn.c_attn.weight, attn.c_proj.weight, mlp.c_fc.weight * 1.702, mlp.c_proj.weight / 1.702)
        c_attn, attn_c_proj, c_fc, mlp_c_proj = (m.detach().to(dtype) for m in matrices)
        return cls(block.ln_1.g.detach(), c_attn, attn_c_proj, block.ln_2.g.detach(), c_fc, mlp_c_proj)


class Decoder:
    """Draws B images at once. What enters position t is pixel t - 1 (sos at 0), what comes out is pixel t.

    Matrices, keys and values are in `precision`; the residual stream, norms, softmax and logits in float32, as under
    autocast.

    Args:
        model: with objective "ar"; its device is where this computes.
        rows: B; on a CPU the next multiple of CPU_ROWS.
        precision: "float32" or "bfloat16".
        chances: how tokens are drawn.
        fixed_lengths: let attention read the cache in whole buckets, and record each step as a CUDA graph where there
            is CUDA; default on a GPU.

    Attributes:
        inputs: (B, T + 1) int64; column t is what enters position t, so the image is in [:, 1:].
        uniforms: (B, T) in [0, 1); column t is what pixel t is drawn with.
    """

    def __init__(
        self,
        model: IGPT,
        rows: int,
        precision: str = "float32",
        chances: Chances | None = None,
        fixed_lengths: bool | None = None,
    ):
        c, device = model.config, model.wpe.device
        rows = -(-rows // CPU_ROWS) * CPU_ROWS if device.type == "cpu" else rows
        self.n_ctx, self.n_head, self.chances = c.n_ctx, c.n_head, chances or Chances()
        self.precision, self.dtype = precision, getattr(torch, precision)
        self.fixed_lengths = device.type == "cuda" if fixed_lengths is None else fixed_lengths
        self.layers = [_Layer.of(block, self.dtype) for block in model.h]  # type: ignore[arg-type]
        self.ln_f, self.wtet = model.ln_f.g.detach(), model.wtet.weight.detach().to(self.dtype)
        self.embedding = torch.cat((model.wte.weight, model.sos[None])).detach()  # (V + 1, D): token V is sos
        self.wpe = model.wpe.detach()
        shape = (2, rows, c.n_head, c.n_ctx, c.n_embd // c.n_head)
        self.cache = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in self.layers]
        self.inputs = torch.full((rows, c.n_ctx + 1), c.n_vocab, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(rows, c.n_ctx, dtype=uniform_dtype(device), device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # t, on the device: a graph is for any t
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def fill(
        self,
        tokens: Tensor,
        streams: Sequence[np.random.Generator],
        given: int,
        progress: Callable[[int], None] = lambda n: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw what follows the given beginnings of at most B images.

        Args:
            tokens: (b, T) int64; what stands behind the first `given` pixels does not matter.
            streams: the random numbers of each image; T are taken.
            progress: called with the pixels drawn since the last call.

        Returns:
            (b, T) int64 tokens, and (b, T) int64 the place in which each came, from 1, 0 = given.

        Raises:
            NonFiniteError: the model's logits overflow.
        """
        b, T = tokens.shape
        self.uniforms[:b] = torch.from_numpy(np.stack([stream.random(T) for stream in streams]))
        for rows in _equal_rows(tokens[:, :given]) if given else ():
            self.prefill(rows, tokens[rows.start, :given])
        for t in range(given, T):
            self.draw(t)
            if (t - given) % 32 == 31 or t == T - 1:
                progress(((t - given) % 32 + 1) * b)
        require_finite(self.finite, self.precision)
        place = np.arange(1, T + 1)
        return self.inputs[:b, 1:].cpu().numpy(), np.where(place > given, place, 0)[None].repeat(b, axis=0)

    @torch.inference_mode()
    def prefill(self, rows: slice, pixels: Tensor) -> None:
        """Let the rows begin with these pixels, (t,) int64, which are computed once for all of them."""
        t = len(pixels)
        self.inputs[rows, 1 : t + 1] = pixels
        h = self.embedding[self.inputs[rows.start, :t]] + self.wpe[:t]  # (t, D)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            q, k, v = self._qkv(layer, h).transpose(1, 2)  # each (H, t, K)
            cache[0, rows, :, :t], cache[1, rows, :, :t] = k, v
            y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            h = self._rest_of_block(layer, h, y.transpose(0, 1).reshape(t, -1))

    @torch.inference_mode()
    def draw(self, t: int) -> None:
        """Draw pixel t of every row; pixels before t are there."""
        self.at.fill_(t)
        length = t + 1
        if self.fixed_lengths:
            length = min(-(-length // BUCKET) * BUCKET, self.n_ctx)
        if not (self.fixed_lengths and self.at.is_cuda):
            self._step(length)
            return
        if length not in self.graphs:
            self.graphs[length] = self._recorded(length)
        self.graphs[length].replay()

    @torch.inference_mode()
    def logits(self, t: int) -> Tensor:
        """What pixel t is predicted from: (B, V) float32; what enters positions up to t is there."""
        self.at.fill_(t)
        return self._logits(t + 1)

    def _recorded(self, length: int) -> torch.cuda.CUDAGraph:
        """The step for caches of this length as a CUDA graph. It is run once before, as recording needs."""
        device = self.at.device
        with torch.cuda.device(device):  # streams and graphs are the current device's, which may be another
            aside, here = _side_stream(device), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self._step(length)
            here.wait_stream(aside)
            # They may share memory: nothing is left in it between steps.
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                self._step(length)
        return graph

    def _step(self, length: int) -> None:
        """Draw the pixel at `self.at`; nothing waits for the device, and to do it again changes nothing."""
        logits = self._logits(length)
        self.finite.logical_and_(torch.isfinite(logits).all())
        tokens = draw(logits, self.uniforms.index_select(1, self.at).squeeze(1), self.chances)
        self.inputs.index_copy_(1, self.at + 1, tokens[:, None])

    def _logits(self, length: int) -> Tensor:
        """(B, V) float32 at position `self.at`, which is below `length`: so much of the cache is read."""
        h = self.embedding[self.inputs.index_select(1, self.at).squeeze(1)] + self.wpe.index_select(0, self.at)
        bias = None
        if self.fixed_lengths:
            later = torch.arange(length, device=h.device)[None] > self.at
            bias = torch.zeros_like(later, dtype=self.dtype).masked_fill(later, -torch.inf)  # (1, t)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            qkv = self._qkv(layer, h)[..., None, :]  # (3, B, H, 1, K)
            cache.index_copy_(3, self.at, qkv[1:])
            y = _attend(qkv[0], cache[0, :, :, :length], cache[1, :, :, :length], bias)
            h = self._rest_of_block(layer, h, y.reshape(len(h), -1))
        return F.linear(self._norm(h, self.ln_f), self.wtet).float()

    def _norm(self, h: Tensor, g: Tensor) -> Tensor:
        return F.rms_norm(h, g.shape, g, eps=1e-5).to(self.dtype)

    def _qkv(self, layer: _Layer, h: Tensor) -> Tensor:
        """(n, D) -> (3, n, H, K)."""
        return F.linear(self._norm(h, layer.ln_1), layer.c_attn).view(len(h), 3, self.n_head, -1).transpose(0, 1)

    def _rest_of_block(self, layer: _Layer, h: Tensor, y: Tensor) -> Tensor:
        """From the heads' outputs y to the block's output: (n, D) -> (n, D)."""
        h = h + F.linear(y, layer.attn_c_proj)
        return h + F.linear(F.silu(F.linear(self._norm(h, layer.ln_2), layer.c_fc)), layer.mlp_c_proj)


def _equal_rows(prefixes: Tensor) -> list[slice]:
    """Stretches of rows that begin alike, such as the completions of one image: (b, t) -> slices of the b rows."""
    changes = (prefixes[1:] != prefixes[:-1]).any(1).nonzero()[:, 0] + 1
    return [slice(a, b) for a, b in pairwise([0, *changes.tolist(), len(prefixes)])]


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded: one for all, for cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """One query of each row and head: (B, H, 1, K), two (B, H, t, K), a bias (1, t) -> (B, H, 1, K).

    Written out for a CPU, where PyTorch's fused kernel rounds otherwise in another batch, and is slower for one query.
    """
    if q.is_cuda:
        with sdpa_kernel(GPU_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # q @ k.mT would read k a quarter slower, in bfloat16 four times slower; so would a q that does not lie together.
    scores = (k @ q.contiguous().mT).mT.float() * k.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(v.dtype) @ v
