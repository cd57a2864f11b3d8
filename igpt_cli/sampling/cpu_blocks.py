"""The blocks and the head of an IGPT for a CPU, one position after the other: few kernels, each as fast as memory.

A step of one position does little arithmetic: it waits for memory, which holds the keys and values, and for the next
kernel to be started. So

- attention is two weighted sums of rows, for which PyTorch has one kernel that reads at the speed of memory
  (`embedding_bag`, made for word vectors), and whose sums do not depend on how many are computed. A matrix product
  with a single row is half as fast; the fused attention kernel is slower still, and rounds by the batch.
- x / RMS(x) is multiplied after a matrix instead of before, and gains, the attention's scale and the activation's
  factor are in the matrices.

Shapes: B rows (images drawn at a time), n positions of a prefix, D width, H heads, K = D / H, V palette size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_cli.models.igpt import IGPT, Block

#: Keys lie in groups of so many positions, and whole groups are read: more would read more in vain, fewer take longer.
GROUP = 64
#: The residual stream has so many columns more: one stands for the norm's epsilon, all keep the rows aligned.
BESIDE = 16
EPSILON = 1e-5


class CPUBlocks:
    """`blocks.CachedBlocks` for a CPU, where `length` is always position + 1.

    Attributes:
        cache: keys, then values of each block: (B, H, groups, K, GROUP), so that each of a group's K rows has one
            number of each position, and (B, H, T, K).
    """

    def __init__(self, model: IGPT, rows: int, dtype: torch.dtype):
        c = model.config
        self.dtype, self.D, self.H, self.K, self.n_ctx = dtype, c.n_embd, c.n_head, c.n_embd // c.n_head, c.n_ctx
        self.groups = -(-c.n_ctx // GROUP)
        self.layers = [self._matrices(block) for block in model.h]  # type: ignore[arg-type]
        self.wtet = self._matrix(model.wtet.weight * (model.ln_f.g * math.sqrt(self.D)))
        self.cache = [
            torch.zeros(shape, dtype=dtype)
            for _ in self.layers
            for shape in ((rows, self.H, self.groups, self.K, GROUP), (rows, self.H, self.n_ctx, self.K))
        ]

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

    @property
    def _blocks(self):
        """For each block its matrices, keys and values."""
        return zip(self.layers, self.cache[::2], self.cache[1::2], strict=True)

    def prefill(self, rows: slice, h: Tensor) -> None:
        """See `CachedBlocks`."""
        n = len(h)
        stream = self._stream(h)
        x = stream[:, : self.D]
        for (c_attn, c_proj, c_fc, mlp_c_proj), keys, values in self._blocks:
            q, k, v = self._normed(stream, c_attn).view(n, 3, self.H, self.K).permute(1, 2, 0, 3)  # each (H, n, K)
            grouped = F.pad(k, (0, 0, 0, -n % GROUP)).view(self.H, -1, GROUP, self.K).mT
            keys[rows, :, : grouped.shape[1]], values[rows, :, :n] = grouped, v
            y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)[0]
            _add(x, y.transpose(0, 1).reshape(n, -1), c_proj)
            _add(x, F.silu(self._normed(stream, c_fc), inplace=True), mlp_c_proj)

    def logits(self, h: Tensor, at: Tensor, length: int) -> Tensor:
        """See `CachedBlocks`."""
        t, D, H, K = length - 1, self.D, self.H, self.K
        group, place = divmod(t, GROUP)
        groups, n = group + 1, len(h) * H
        key_rows = _beginnings(n, self.groups * K, groups * K)
        key_bags = torch.arange(n * groups, dtype=torch.int32) * K
        value_rows = _beginnings(n, self.n_ctx, length)
        value_bags = torch.arange(n, dtype=torch.int32) * length
        stream = self._stream(h)
        x = stream[:, :D]
        for (c_attn, c_proj, c_fc, mlp_c_proj), keys, values in self._blocks:
            q, k, v = self._normed(stream, c_attn).view(-1, 3, H, K).unbind(1)  # each (B, H, K)
            keys[:, :, group, :, place], values[:, :, t] = k, v
            weights = q[:, :, None].expand(-1, -1, groups, -1).reshape(-1)  # those of its rows, for each group
            scores = _sum_of_rows(keys.view(-1, GROUP), key_rows, key_bags, weights).view(n, groups * GROUP)
            chances = scores[:, :length].float().softmax(-1).to(self.dtype)
            y = _sum_of_rows(values.view(-1, K), value_rows, value_bags, chances.view(-1))  # (B * H, K)
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


def _beginnings(n: int, each: int, length: int) -> Tensor:
    """The first `length` of each of n stretches of `each` rows: (n * length,) int32."""
    starts = torch.arange(n, dtype=torch.int32)[:, None] * each
    return (starts + torch.arange(length, dtype=torch.int32)).view(-1)


def _sum_of_rows(rows: Tensor, which: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: (R, W), indices (n,), beginnings of the sums (S,), weights (n,) -> (S, W)."""
    return torch.embedding_bag(rows, which, bags, mode=0, per_sample_weights=weights)[0]
