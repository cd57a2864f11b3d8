"""ResNet: residual networks of convolutions (He et al. 2016, "Deep Residual Learning for Image Recognition").

The file follows sections 3 and 4.1. The bottleneck is that of "v1.5": its stride lies in the 3x3 convolution, where the
paper has it in the first 1x1. With norm "group" it is the network of the ViT paper's hybrids (section 3.1 there): group
normalisation, weight-standardised convolutions, padding as TensorFlow's SAME.

Shapes: B batch, R resolution, H x W the positions of a map, D its channels, S stages, L residual blocks, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.models.contract import ModelConfig, RGBModel, block_inputs

#: stem -> (side of its convolution, stride of it, whether a 3x3 max pooling with stride 2 follows).
STEMS = {"7x7": (7, 2, True), "3x3": (3, 1, False), "3x3-pool": (3, 1, True)}


@dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """Everything that decides the architecture.

    depths: residual blocks of each stage; every stage after the first halves the map and doubles the channels. The
        ImageNet networks have four, a hybrid ViT's may have fewer.
    block: "basic", two 3x3 convolutions, or "bottleneck", 1x1, 3x3, 1x1 with four times the channels at the end.
    width: channels of the stem; those inside the blocks of stage s = 1, 2, ... are width * 2^(s - 1).
    stem: "7x7" with stride 2 and max pooling, for ImageNet; "3x3" with stride 1, for 32x32; "3x3-pool", for 64x64.
    norm: "batch", or "group", the ViT paper's.
    zero_init: the gain of each block's last norm begins at 0, so that the blocks begin as the identity (Goyal et al.
        2017, section 5.1); otherwise at 1, as in the paper.
    n_classes: C of the class head; None for a model without one.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    block: str = "basic"
    width: int = 64
    stem: str = "7x7"
    norm: str = "batch"
    zero_init: bool = False
    resolution: int = 224
    n_classes: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))
        self.check_whole("width", "resolution", "depths")
        self.check_classes()
        for name, known in (("block", BLOCKS), ("stem", self.stems), ("norm", ("batch", "group"))):
            self.check_one_of(name, known)
        if self.norm == "group" and self.width % GROUPS:
            raise ValueError(f"width {self.width} does not divide into {GROUPS} groups, which norm 'group' needs")
        if self.resolution < self.stride(len(self.depths)):
            raise ValueError(
                f"resolution {self.resolution} is less than the network's stride, {self.stride(len(self.depths))}; use "
                "the stem 3x3, or fewer stages"
            )

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems that this network can have."""
        return tuple(STEMS)

    def channels(self, stage: int) -> int:
        """D after the stem (stage 0) or after stage 1, 2, ..."""
        return self.width if stage == 0 else self.width * 2 ** (stage - 1) * BLOCKS[self.block].expansion

    def stride(self, stage: int) -> int:
        """Pixels of the image from one position to the next, after the stem (stage 0) or after stage 1, 2, ..."""
        return self.stem_stride * 2 ** max(0, stage - 1)

    @property
    def stem_stride(self) -> int:
        """Pixels of the image from one position of the first map to the next."""
        _, stride, pooled = STEMS[self.stem]
        return 2 * stride if pooled else stride


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 (Qiao et al. 2019), padded as TensorFlow's SAME."""

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W) -> (B, D', H / stride, W / stride), rounded up
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-8)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class MaxPoolSame(nn.Module):
    """3x3 max pooling with stride 2, padded as TensorFlow's SAME; the values must not be negative."""

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W) -> (B, D, H / 2, W / 2), rounded up
        return F.max_pool2d(pad_same(x, 3, 2), 3, stride=2)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around (B, D, H, W), so that a kernel gives ceil(H / stride) rows; what is odd goes below and right."""
    sides = []
    for n in (x.shape[-1], x.shape[-2]):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


#: Of group normalisation.
GROUPS = 32


def convolution(d_in: int, d_out: int, kernel: int, stride: int, norm: str) -> nn.Conv2d:
    """Without a bias, which the norm behind it has."""
    if norm == "group":
        return StandardisedConv2d(d_in, d_out, kernel, stride, bias=False)
    return nn.Conv2d(d_in, d_out, kernel, stride, padding=kernel // 2, bias=False)


def normalisation(d: int, norm: str) -> nn.Module:
    return nn.GroupNorm(GROUPS, d) if norm == "group" else nn.BatchNorm2d(d)


class Residual(nn.Module, ABC):
    """relu(shortcut(x) + branch(x)); the shortcut is a 1x1 convolution where the shape changes (option B)."""

    expansion: int

    def __init__(self, d_in: int, width: int, stride: int, norm: str):
        super().__init__()
        d_out = width * self.expansion
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or d_in != d_out:
            self.shortcut = nn.Sequential(convolution(d_in, d_out, 1, stride, norm), normalisation(d_out, norm))

    @property
    @abstractmethod
    def last_norm(self) -> nn.Module:
        """Whose gain `zero_init` sets to 0."""

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """F(x) of the paper."""

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W) -> (B, D', H / stride, W / stride)
        return F.relu(self.shortcut(x) + self.branch(x))


class BasicBlock(Residual):
    """3x3, 3x3 (figure 5, left)."""

    expansion = 1

    def __init__(self, d_in: int, width: int, stride: int, norm: str):
        super().__init__(d_in, width, stride, norm)
        self.conv1 = convolution(d_in, width, 3, stride, norm)
        self.norm1 = normalisation(width, norm)
        self.conv2 = convolution(width, width, 3, 1, norm)
        self.norm2 = normalisation(width, norm)

    @property
    def last_norm(self) -> nn.Module:
        return self.norm2

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class Bottleneck(Residual):
    """1x1, 3x3 with the stride, 1x1 (figure 5, right)."""

    expansion = 4

    def __init__(self, d_in: int, width: int, stride: int, norm: str):
        super().__init__(d_in, width, stride, norm)
        self.conv1 = convolution(d_in, width, 1, 1, norm)
        self.norm1 = normalisation(width, norm)
        self.conv2: Any = convolution(width, width, 3, stride, norm)
        self.norm2 = normalisation(width, norm)
        self.conv3 = convolution(width, width * self.expansion, 1, 1, norm)
        self.norm3 = normalisation(width * self.expansion, norm)

    @property
    def last_norm(self) -> nn.Module:
        return self.norm3

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x))


BLOCKS: dict[str, type[Residual]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class Stem(nn.Module):
    """The first convolution, its norm, and max pooling where the stem has it."""

    def __init__(self, width: int, stem: str, norm: str):
        super().__init__()
        kernel, stride, pooled = STEMS[stem]
        self.conv = convolution(3, width, kernel, stride, norm)
        self.norm = normalisation(width, norm)
        self.pool: nn.Module = nn.Identity()
        if pooled:
            self.pool = MaxPoolSame() if norm == "group" else nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, D, H, W)
        return self.pool(F.relu(self.norm(self.conv(x))))


class ResNet(RGBModel):
    """Stem, stages of residual blocks, the mean over positions, a linear class head."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        self.stem = self.new_stem()
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.depths, 1):
            blocks = nn.Sequential()
            for i in range(depth):
                d_in = config.channels(stage - 1 if i == 0 else stage)
                blocks.append(self.new_block(stage, d_in, stride=2 if i == 0 and stage > 1 else 1))
            self.stages.append(blocks)
        if config.n_classes:
            self.head = nn.Linear(config.channels(len(config.depths)), config.n_classes)
        self.init_weights()

    def new_stem(self) -> nn.Module:
        """What makes (B, 3, R, R) the first map."""
        return Stem(self.config.width, self.config.stem, self.config.norm)

    def new_block(self, stage: int, d_in: int, stride: int) -> Residual:
        """A residual block of stage 1, 2, ..., from d_in channels."""
        c = self.config
        return BLOCKS[c.block](d_in, c.width * 2 ** (stage - 1), stride, c.norm)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values.

        | tensor                         | value                                                          |
        |--------------------------------|----------------------------------------------------------------|
        | convolutions                   | normal, variance 2 / (outputs * side^2) (He et al. 2015)       |
        | norms                          | gain 1, bias 0; with `zero_init` the last gain of each block 0 |
        | class head                     | normal, std 0.01 (Goyal et al. 2017), bias 0                   |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.reset_parameters()
        if self.config.zero_init:
            for block in self.blocks:
                nn.init.zeros_(block.last_norm.weight)
        if self.config.n_classes:
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    @property
    def n_layers(self) -> int:
        """L. Features exist for the layers 0..L: what enters residual block l, and what leaves the last at L."""
        return sum(self.config.depths)

    @property
    def blocks(self) -> list[Any]:
        """The L residual blocks, from the first stage to the last."""
        return [block for stage in self.stages for block in stage.children()]

    def stage_maps(self, x: Tensor, stages: Iterable[int]) -> dict[int, Tensor]:
        """Maps of the requested stages, from one pass that stops after the last of them.

        Args:
            x: (B, 3, H, W) float.
            stages: 0 for the stem, 1.. for the stages.

        Returns:
            {stage: (B, config.channels(stage), H / config.stride(stage), W / config.stride(stage))}, in rising order.

        Raises:
            ValueError: a stage that the network does not have.
        """
        requested = sorted(set(stages))
        if requested and not 0 <= requested[0] <= requested[-1] <= len(self.stages):
            raise ValueError(f"stages {requested} requested, this model has the stages 0 (stem) to {len(self.stages)}")
        out = {}
        for stage in range(requested[-1] + 1 if requested else 0):
            x = (self.stages[stage - 1] if stage else self.stem)(x)
            if stage in requested:
                out[stage] = x
        return out

    def feature_map(self, x: Tensor) -> Tensor:
        """What the last stage gives: (B, 3, H, W) -> (B, D, H', W'). A hybrid ViT takes its positions as tokens."""
        last = len(self.stages)
        return self.stage_maps(x, [last])[last]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the maps of `pyramid`: pixels of the image from one position to the next."""
        return tuple(self.config.stride(stage) for stage in range(1, len(self.stages) + 1))

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the maps of `pyramid`."""
        return tuple(self.config.channels(stage) for stage in range(1, len(self.stages) + 1))

    def pyramid(self, x: Tensor) -> dict[str, Tensor]:
        """What each stage gives, as the backbone of a detection or segmentation network.

        Args:
            x: (B, 3, H, W) float.

        Returns:
            {"stage1": (B, D, H / stride, W / stride), ...}, from fine to coarse, of `strides` and `channels`.
        """
        return {f"stage{s}": h for s, h in self.stage_maps(x, range(1, len(self.stages) + 1)).items()}

    def pooled(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, D)
        """The mean over positions of what leaves the last stage."""
        return self.feature_map(x).mean(dim=(2, 3))

    def inputs(self, x: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(layer, (B, D, H, W)): what enters the residual blocks."""
        return block_inputs(self.stem(x), self.blocks, layers)

    def normed(self, layer: int, h: Tensor) -> Tensor:  # (B, D, H, W) -> (B, H * W, D)
        """What enters the block, as it is: there is no norm before it."""
        return h.flatten(2).transpose(1, 2)
