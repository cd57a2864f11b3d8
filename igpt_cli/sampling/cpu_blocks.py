"""Blocks and head of an IGPT on a CPU: few kernels, bound by memory.

A step of one position waits for memory, which holds keys and values, and for the start of kernels. So

- the values' part of attention is `embedding_bag`, which reads at the speed of memory and whose sums do not depend on
  the batch. A matrix product with a single row takes twice as long; the fused attention kernel longer still.
- x / RMS(x) is multiplied after a matrix; gains, attention's scale and the activation's factor are in the matrices.

Shapes: B rows (images drawn at a time), n positions of a prefix, D width, H heads, K = D / H, V palette size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_cli.models.igpt import IGPT, Block

#: The residual stream has so many columns more: one stands for the norm's epsilon, all keep the rows aligned.
BESIDE = 16
EPSILON = 1e-5


class CPUBlocks:
    """`blocks.CachedBlocks` for a CPU; `length` is always position + 1, cache is keys and values, each (L, B, H, T,
    K).
    """

    def __init__(self, model: IGPT, rows: int, dtype: torch.dtype):
        c = model.config
        self.dtype, self.D, self.H, self.K, self.n_ctx = dtype, c.n_embd, c.n_head, c.n_embd // c.n_head, c.n_ctx
        self.layers = [self._matrices(block) for block in model.h]  # type: ignore[arg-type]
        self.wtet = self._matrix(model.wtet.weight * (model.ln_f.g * math.sqrt(self.D)))
        self.cache = [torch.zeros(c.n_layer, rows, self.H, c.n_ctx, self.K, dtype=dtype) for _ in range(2)]
        self.keys, self.values = self.cache
        self.value_rows = self.values.view(c.n_layer, -1, self.K).unbind()

    def _matrices(self, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_attn and c_proj of the attention, c_fc and c_proj of the MLP.

        x * sigmoid(1.702 x) is silu(1.702 x) / 1.702; `_normed` leaves out the gain and sqrt(D).
        """
        root = math.sqrt(self.D)
        c_attn = block.attn.c_attn.weight * (block.ln_1.g * root)
        c_attn = torch.cat((c_attn[: self.D] * self.K**-0.5, c_attn[self.D :]))
        c_fc = block.mlp.c_fc.weight * (block.ln_2.g * (root * 1.702))
        matrices = (c_attn, block.attn.c_proj.weight, c_fc, block.mlp.c_proj.weight / 1.702)
        return tuple(self._matrix(m) for m in matrices)  # type: ignore[return-value]

    def _matrix(self, weight: Tensor) -> Tensor:
        """(out, in) -> (in, out) in the precision of the computation."""
        return weight.detach().to(self.dtype).t()

    def prefill(self, rows: slice, h: Tensor) -> None:
        """See `CachedBlocks`."""
        n = len(h)
        stream = self._stream(h)
        x = stream[:, : self.D]
        for (c_attn, c_proj, c_fc, mlp_c_proj), keys, values in zip(self.layers, self.keys, self.values):
            q, k, v = self._normed(stream, c_attn).view(n, 3, self.H, self.K).permute(1, 2, 0, 3)  # each (H, n, K)
            keys[rows, :, :n], values[rows, :, :n] = k, v
            y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)[0]
            _add(x, y.transpose(0, 1).reshape(n, -1), c_proj)
            _add(x, F.silu(self._normed(stream, c_fc), inplace=True), mlp_c_proj)

    def logits(self, h: Tensor, at: Tensor, length: int) -> Tensor:
        """See `CachedBlocks`."""
        t, D, H, K = length - 1, self.D, self.H, self.K
        new_keys, new_values = self.keys[:, :, :, t].unbind(), self.values[:, :, :, t].unbind()
        keys = self.keys[:, :, :, :length].unbind()
        n = len(h) * H  # of what lies in n stretches of n_ctx rows, the first `length` of each are summed
        stretches = torch.arange(n, dtype=torch.int32)
        rows = (stretches[:, None] * self.n_ctx + torch.arange(length, dtype=torch.int32)).view(-1)
        sums = stretches * length
        stream = self._stream(h)
        x = stream[:, :D]
        for layer, (c_attn, c_proj, c_fc, mlp_c_proj) in enumerate(self.layers):
            q, k, v = self._normed(stream, c_attn).view(-1, 3, H, K).unbind(1)  # each (B, H, K)
            new_keys[layer].copy_(k)
            new_values[layer].copy_(v)
            # q @ k.mT would read k a quarter slower, in bfloat16 four times; so would a q that does not lie together.
            scores = (keys[layer] @ q.contiguous().unsqueeze(2).mT).view(n, length)
            weights = scores.softmax(-1, torch.float32).to(self.dtype).view(-1)
            y = torch.embedding_bag(self.value_rows[layer], rows, sums, mode=0, per_sample_weights=weights)[0]
            _add(x, y.view(-1, D), c_proj)
            _add(x, F.silu(self._normed(stream, c_fc), inplace=True), mlp_c_proj)
        return self._normed(stream, self.wtet).float()

    def _stream(self, h: Tensor) -> Tensor:
        """The residual stream (n, D), with columns beside it whose squares sum up to D * EPSILON."""
        stream = F.pad(h, (0, BESIDE))
        stream[:, self.D] = math.sqrt(self.D * EPSILON)
        return stream

    def _normed(self, stream: Tensor, matrix: Tensor) -> Tensor:
        """h / sqrt(D * (mean(h^2) + EPSILON)) @ matrix: (n, D + BESIDE) -> (n, out)."""
        product = torch.mm(stream[:, : self.D].to(self.dtype), matrix)
        return product.div_(torch.linalg.vector_norm(stream, dim=1, keepdim=True))


def _add(x: Tensor, y: Tensor, matrix: Tensor) -> None:
    """x += y @ matrix, in one kernel where all are of one precision."""
    if x.dtype == matrix.dtype:
        x.addmm_(y, matrix)
    else:
        x.add_(torch.mm(y, matrix))
