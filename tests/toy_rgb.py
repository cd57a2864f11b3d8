"""A toy model of RGB images with everything that training must care about: running statistics, positions, tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from igpt_cli.models.presets import PRESETS, Preset
from igpt_cli.models.registry import BACKENDS


@dataclass(frozen=True)
class ToyConfig:
    width: int = 8
    drop_path_rate: float = 0.0
    resolution: int = 8
    n_classes: int | None = None

    def __post_init__(self):
        if self.resolution % 2:
            raise ValueError(f"resolution {self.resolution} does not divide into patches of 2")

    def to_dict(self) -> dict:
        return {k: v for k, v in asdict(self).items() if v is not None}


class ToyBlock(nn.Module):
    """A convolution with BatchNorm, left out for some images in training; a table without a place in checkpoints."""

    def __init__(self, width: int, drop: float):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = drop
        self.register_buffer("gain", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))) * self.gain
        if self.training and self.drop:
            y = y * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop) / (1 - self.drop)
        return x + y


class Toy(nn.Module):
    input_kind = "rgb"
    n_layers = 2

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.patch = nn.Conv2d(3, config.width, 2, 2)
        side = config.resolution // 2
        self.pos_embed = nn.Parameter(torch.zeros(config.width, side, side))
        self.blocks = nn.ModuleList(ToyBlock(config.width, config.drop_path_rate) for _ in range(2))
        self.norm = nn.LayerNorm(config.width)
        if config.n_classes:
            self.head = nn.Linear(config.width, config.n_classes)

    def hidden(self, x: Tensor) -> Tensor:
        x = self.patch(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    def features(self, x: Tensor, layers: Iterable[int], pool: str = "mean") -> dict[int, Tensor]:
        return {layer: self.hidden(x) for layer in layers}


class TwoHeaded(Toy):
    """With a distillation head; the mean of both logits is what it is tested by."""

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        if config.n_classes:
            self.head_dist = nn.Linear(config.width, config.n_classes)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x)
        return self.head(hidden), self.head_dist(hidden)

    def features(self, x: Tensor, layers: Iterable[int], pool: str = "mean") -> dict[int, Tensor]:
        """Positions (B, 3, D): two tokens, and the mean of the image; with each layer the tokens turn to one another."""
        mean = self.hidden(x)
        one, other = mean.roll(1, 1), mean.roll(2, 1)
        return {layer: torch.stack([one, other + layer * one, mean], 1) for layer in layers}

    def together(self, of_classes: Tensor, of_distillation: Tensor) -> Tensor:
        return (of_classes + of_distillation) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.together(*self.heads(x))


TOYS = {"toy": Toy, "toy-distilled": TwoHeaded}


def register() -> None:
    """Let the toys be models like any other."""
    for name, model in TOYS.items():
        BACKENDS[name] = (model, ToyConfig)
        PRESETS[name] = Preset(name, name, {"width": 8}, {}, {}, "a toy")


def unregister() -> None:
    for name in TOYS:
        BACKENDS.pop(name, None)
        PRESETS.pop(name, None)
