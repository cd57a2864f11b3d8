"""Swin: a transformer with windows that shift (Liu et al. 2021, "Swin Transformer", arXiv 2103.14030).

The file follows section 3 and, where the paper leaves things open, its code: attention within windows of M x M patches,
a learned bias for each relative position, every second block on windows that are shifted by M / 2, and a hierarchy of
stages, each with half the grid and twice the width of the one before.

Shapes: B batch, R resolution, H x W the grid of patches (of a stage), D its width, M side of a window, n = M * M,
W' windows of an image, A heads (num_heads), K head width (D / A), S stages, L blocks of all stages, C classes.

Sizes that do not divide. The paper's classification code refuses them, and so does `SwinConfig`, with sizes that would
fit. A model that was built may be called with images of other sizes, square or not, as detection and segmentation do:
then zeros are added on the right and below, as footnote 4 of the paper has it, to the image for whole patches, to the
normed grid for whole windows (before the shift), and to grids of odd sides before merging. Such zeros are seen as keys
and are cut off again. transformers does the same; timm pads after the shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.models.contract import ModelConfig, RGBModel, check_attention
from igpt_cli.models.stochastic_depth import StochasticDepth, depth_rates
from igpt_cli.models.windows import (
    between_places,
    pad_to,
    partition,
    relative_positions,
    resize_bias_table,
    shift_mask,
    unpartition,
)


@dataclass(frozen=True)
class SwinConfig(ModelConfig):
    """Everything that decides the architecture; the defaults are Swin-T's.

    embed_dim: D of the first stage; it doubles with each further one.
    depths, num_heads: blocks and heads of each stage.
    window_size: M. Where a stage's grid is smaller than that, its window is the whole grid.
    patch_size: pixels of a side of a patch; 4 in the paper.
    mlp_ratio: width of the MLP's hidden layer over D.
    shift: False keeps the windows where they are in all blocks, for the paper's ablation (Table 4).
    drop_path_rate: of stochastic depth, for the last block; it grows from 0 by equal steps over all blocks.
    n_classes: C of the class head; None for a model without one.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    patch_size: int = 4
    mlp_ratio: float = 4.0
    shift: bool = True
    drop_path_rate: float = 0.0
    resolution: int = 224
    n_classes: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "num_heads", tuple(self.num_heads))
        self.check_whole("embed_dim", "window_size", "patch_size", "resolution", "depths", "num_heads")
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {list(self.depths)} and num_heads {list(self.num_heads)} differ in length; one each a stage"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(
                    f"stage {stage + 1} has a width of {self.width(stage)}, not a multiple of its {heads} heads"
                )
        if int(self.mlp_ratio * self.embed_dim) < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio!r}, which leaves no hidden layer")
        depth_rates(self.drop_path_rate, 1)
        self.check_classes()
        self._check_grids()

    def _check_grids(self) -> None:
        """
        Raises:
            ValueError: a grid is not whole, or not whole windows; the text names sizes that fit.
        """
        R, P, M = self.resolution, self.patch_size, self.window_size
        step = P * 2 ** (len(self.depths) - 1)
        if R % step:
            near = sorted({max(step, R // step * step), (R // step + 1) * step})
            raise ValueError(
                f"resolution {R} does not divide into patches of {P}, halved in {len(self.depths) - 1} stages; "
                f"it must be a multiple of {step}, such as {' or '.join(map(str, near))}; or take a smaller patch_size"
            )
        grids = [self.grid(stage) for stage in range(len(self.depths))]
        if not _whole_windows(grids, M):
            fitting = sorted((m for m in range(2, grids[0] + 1) if _whole_windows(grids, m)), key=lambda m: abs(m - M))
            raise ValueError(
                f"window_size {M} does not divide the grids {', '.join(map(str, grids))} of {R} pixels with patch_size "
                f"{P}; take window_size {' or '.join(map(str, fitting[:2]))}, or another resolution or patch_size"
            )

    def width(self, stage: int) -> int:
        """D of stage 0, 1, ..."""
        return self.embed_dim * 2**stage

    def grid(self, stage: int) -> int:
        """Patches on a side of an image at stage 0, 1, ..."""
        return self.resolution // self.stride(stage)

    def stride(self, stage: int) -> int:
        """Pixels of the image from one position to the next, at stage 0, 1, ..."""
        return self.patch_size * 2**stage

    def window(self, stage: int) -> int:
        """M of stage 0, 1, ...: no more than its grid."""
        return min(self.window_size, self.grid(stage))


def _whole_windows(grids: Iterable[int], M: int) -> bool:
    return all(grid <= M or grid % M == 0 for grid in grids)


class PatchEmbed(nn.Module):
    """A linear map of each patch of P x P pixels, and its norm."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, H, W, D)
        P = self.proj.stride[0]
        x = pad_to(x.permute(0, 2, 3, 1), P).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2 x 2 neighbours become one: their norm, and a linear map from 4 D to 2 D."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, D) -> (B, H / 2, W / 2, 2 D)
        x = pad_to(x, 2)
        # In the order of the paper's code, rows first: upper left, lower left, upper right, lower right.
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class WindowAttention(nn.Module):
    """softmax(Q K^T / sqrt(K) + bias) V within each window, for every head (equation 4)."""

    positions: Tensor

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)  # rows: query, key, value
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.register_buffer("positions", relative_positions(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, W', n, D) -> (B, W', n, D)
        B, windows, n, D = x.shape
        A = self.num_heads
        qkv = self.qkv(x).view(B, windows, n, 3, A, D // A).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.reshape(3, B, windows * A, n, D // A)  # each window of each head is one attention
        bias = self.bias_table[self.positions].permute(2, 0, 1)  # (A, n, n)
        if mask is not None:
            bias = bias + mask[:, None]  # (W', A, n, n)
        bias = bias.expand(windows, A, n, n).reshape(1, windows * A, n, n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y = y.view(B, windows, A, n, D // A).transpose(2, 3).reshape(B, windows, n, D)
        return self.proj(y)

    def probabilities(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, W', n, D) -> (B, W', A, n, n)
        """With which probability each position of a window looks at each: the plain formula."""
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each (B, W', A, n, K)
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + self.bias_table[self.positions].permute(2, 0, 1)
        return (scores if mask is None else scores + mask[:, None]).softmax(dim=-1)


class MLP(nn.Module):
    """D -> mlp_ratio D -> D around GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x' = attention(norm1(x)) + x;  x'' = mlp(norm2(x')) + x'   (equation 3).

    shift: by how many patches the windows are moved against the grid; 0 leaves them. A grid that is no larger than one
    window is never shifted.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, mlp_ratio: float, drop_path_rate: float):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, D) -> (B, H, W, D)
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:  # (B, H, W, D) -> (B, H, W, D)
        """Attention in the windows of a grid, cyclically shifted and back."""
        H, W = x.shape[1:3]
        x, mask, shift = self.shifted(x)
        x = unpartition(self.attn(partition(x, self.window), mask), *x.shape[1:3])
        if shift:
            x = x.roll((shift, shift), dims=(1, 2))
        return x[:, :H, :W]

    def shifted(self, x: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """A grid (B, H, W, D) padded to whole windows and rolled, the mask for that, and by how much it was rolled."""
        shift, mask = self.shift if min(x.shape[1:3]) > self.window else 0, None
        x = pad_to(x, self.window)
        if shift:
            mask = shift_mask(x.shape[1], x.shape[2], self.window, shift, x.device)
            x = x.roll((-shift, -shift), dims=(1, 2))
        return x, mask, shift

    def attention(self, x: Tensor) -> Tensor:  # (B, H, W, D) -> (B, A, H * W, H * W)
        """With which probability each place of the grid looks at each; what padding takes is not there."""
        H, W = x.shape[1:3]
        n, mask, shift = self.shifted(self.norm1(x))
        p = self.attn.probabilities(partition(n, self.window), mask)
        return between_places(p, H, W, self.window, shift)


class Stage(nn.Module):
    """Patch merging, but for the first stage, and blocks: W-MSA and SW-MSA in turn."""

    def __init__(self, config: SwinConfig, stage: int, rates: Iterable[float]):
        super().__init__()
        D, M = config.width(stage), config.window(stage)
        self.merge: nn.Module = PatchMerging(D // 2) if stage else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(D, config.num_heads[stage], M, M // 2 if config.shift and i % 2 else 0, config.mlp_ratio, rate)
            for i, rate in enumerate(rates)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, D) -> (B, H', W', D')
        x = self.merge(x)
        for block in self.blocks:
            x = block(x)
        return x


class Swin(RGBModel):
    """Patches, stages, the last norm, the mean over positions, a linear class head (figure 3)."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
        rates = iter(depth_rates(config.drop_path_rate, self.n_layers))
        self.stages: Any = nn.ModuleList(
            Stage(config, stage, [next(rates) for _ in range(depth)]) for stage, depth in enumerate(config.depths)
        )
        self.norm = nn.LayerNorm(self.channels[-1])
        if config.n_classes:
            self.head = nn.Linear(self.channels[-1], config.n_classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values of the paper's code.

        | tensor              | value                                                                     |
        |---------------------|---------------------------------------------------------------------------|
        | linear maps         | normal, std 0.02, cut at -2 and 2; bias 0                                 |
        | bias tables         | normal, std 0.02, cut at -2 and 2                                         |
        | norms               | gain 1, bias 0                                                            |
        | patch embedding     | PyTorch's default for convolutions: uniform within 1 / sqrt(3 P^2)        |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.bias_table, std=0.02)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()

    @property
    def n_layers(self) -> int:
        """L. Features exist for the layers 0..L: the normed input of block l, and the final norm at L."""
        return sum(self.config.depths)

    @property
    def blocks(self) -> list[Block]:
        """The L blocks, from the first stage to the last; each is a map (B, H, W, D) -> (B, H, W, D)."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one position to the next in the maps of `pyramid`: 4, 8, 16, 32."""
        return tuple(self.config.stride(stage) for stage in range(len(self.config.depths)))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps of `pyramid`: C, 2 C, 4 C, 8 C."""
        return tuple(self.config.width(stage) for stage in range(len(self.config.depths)))

    def hidden(self, x: Tensor) -> Tensor:
        """The output of the final norm: (B, 3, R, R) float -> (B, H, W, D) of the last stage."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, D)
        """The mean over positions of the final norm's output."""
        return self.hidden(x).mean(dim=(1, 2))

    def inputs(self, x: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(layer, (B, H, W, D)): what enters the blocks, counted through the stages, after any merging."""
        h, layer = self.patch_embed(x), 0
        for stage in self.stages if layers else ():
            h = stage.merge(h)
            for block in stage.blocks:
                if layer in layers:
                    yield layer, h
                if layer == layers[-1]:
                    return
                h, layer = block(h), layer + 1
        if layers:
            yield layer, h

    def normed(self, layer: int, h: Tensor) -> Tensor:  # (B, H, W, D) -> (B, H * W, D)
        """The normed input of the block; of L, the output of the final norm."""
        norm = self.blocks[layer].norm1 if layer < self.n_layers else self.norm
        return norm(h).flatten(1, 2)

    def attention(self, x: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """With which probability each place looks at each: {layer: (B, A, T, T)}, query before key, in raster order.

        It is 0 outside the window. Where a grid is padded to whole windows, the padding's part of the sum of 1 is
        missing.

        Args:
            x: (B, 3, R, R) float.
            layers: which of the blocks 0..L - 1; the pass stops at the deepest.

        Raises:
            ValueError: a layer outside 0..L - 1.
        """
        requested = check_attention(layers, self.n_layers)
        return {layer: self.blocks[layer].attention(h) for layer, h in self.inputs(x, requested)}

    def pyramid(self, x: Tensor) -> dict[str, Tensor]:
        """What each stage gives, as the backbone of a detection or segmentation network.

        The last map went through the model's final norm. The others went through a layer norm without gain and bias,
        for the class model has none there: with that the paper's detection code begins, too, and learns a gain and a
        bias for each map. As everywhere here, a grid that is no larger than one window is not shifted.

        Args:
            x: (B, 3, H, W) float, of any size.

        Returns:
            {"stage1": (B, C, H / 4, W / 4), ..., "stage4": (B, 8 C, H / 32, W / 32)}, from fine to coarse; `strides`
            and `channels` give the sizes of any model. Sides that do not divide are rounded up.
        """
        h, out = self.patch_embed(x), {}
        for s, stage in enumerate(self.stages, 1):
            h = stage(h)
            normed = self.norm(h) if s == len(self.stages) else F.layer_norm(h, h.shape[-1:])
            out[f"stage{s}"] = normed.permute(0, 3, 1, 2).contiguous()
        return out


def resize_windows(weights: Mapping[str, Tensor], config: SwinConfig) -> dict[str, Tensor]:
    """Weights of a Swin (its state dict) with every bias table resized to the windows that `config` has."""
    out = dict(weights)
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            key = f"stages.{stage}.blocks.{i}.attn.bias_table"
            if key in out:
                out[key] = resize_bias_table(out[key], config.window(stage))
    return out
