"""Blocks and head of an IGPT, position by position, with a key-value cache.

Here as a GPU computes them best; `cpu_blocks` has the same for a CPU, and both are asked alike.

Shapes: B rows (images drawn at a time), T positions, D width, H heads, K = D / H, V palette size.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from igpt_cli.models.igpt import IGPT, Block

#: The one fused kernel on a GPU that takes a mask and any length, and what stands in where it cannot.
GPU_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CachedBlocks(Protocol):
    """What a `Decoder` calls; `cache` holds the keys and values of all blocks, allocated once."""

    cache: list[Tensor]

    def prefill(self, rows: slice, h: Tensor) -> None:
        """Start these rows with the inputs (t, D) of positions 0..t-1 to the first block, the same for all."""

    def logits(self, h: Tensor, at: Tensor, length: int) -> Tensor:
        """Append a position to every row.

        Args:
            h: (B, D) float32, the input to the first block there.
            at: (1,) int64 on the device, the position; earlier ones are in the cache.
            length: so much of the cache is read, at least position + 1.

        Returns:
            (B, V) float32.
        """


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


class Blocks:
    """`CachedBlocks` with as few kernels as PyTorch has for them; no step waits for the device.

    fixed_lengths: `length` may exceed position + 1; what lies beyond is masked.
    """

    def __init__(self, model: IGPT, rows: int, dtype: torch.dtype, fixed_lengths: bool):
        c = model.config
        self.n_head, self.dtype, self.fixed_lengths = c.n_head, dtype, fixed_lengths
        self.layers = [_Layer.of(block, dtype) for block in model.h]  # type: ignore[arg-type]
        self.ln_f, self.wtet = model.ln_f.g.detach(), model.wtet.weight.detach().to(dtype)
        shape = (2, rows, c.n_head, c.n_ctx, c.n_embd // c.n_head)
        self.cache = [torch.zeros(shape, dtype=dtype, device=model.wpe.device) for _ in self.layers]

    def prefill(self, rows: slice, h: Tensor) -> None:
        """See `CachedBlocks`."""
        t = len(h)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            q, k, v = self._qkv(layer, h).transpose(1, 2)  # each (H, t, K)
            cache[0, rows, :, :t], cache[1, rows, :, :t] = k, v
            y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            h = self._rest_of_block(layer, h, y.transpose(0, 1).reshape(t, -1))

    def logits(self, h: Tensor, at: Tensor, length: int) -> Tensor:
        """See `CachedBlocks`."""
        bias = None
        if self.fixed_lengths:
            later = torch.arange(length, device=h.device)[None] > at
            bias = torch.zeros_like(later, dtype=self.dtype).masked_fill(later, -torch.inf)  # (1, t)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            qkv = self._qkv(layer, h)[..., None, :]  # (3, B, H, 1, K)
            cache.index_copy_(3, at, qkv[1:])
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


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """One query of each row and head: (B, H, 1, K), two (B, H, t, K), a bias (1, t) -> (B, H, 1, K)."""
    with sdpa_kernel(GPU_ATTENTION) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
