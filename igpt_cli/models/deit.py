"""DeiT: ViT trained on ImageNet alone, and taught through a token (Touvron et al. 2021, arXiv 2012.12877).

The network is ViT's; what differs are the initial values, the recipe (`training.recipes`), and, of the distilled
form, a second token and a second head (section 4): a teacher's decisions are learned by the distillation token alone,
the labels by the class token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from igpt_cli.models.vit import ViT, ViTConfig


class DeiT(ViT):
    """A ViT with DeiT's initial values."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values of the paper's code.

        | tensor                                 | value                                                     |
        |----------------------------------------|-----------------------------------------------------------|
        | linear maps, class heads               | normal, std 0.02, cut at -2 and 2; bias 0                 |
        | class and distillation token, positions| normal, std 0.02, cut at -2 and 2                         |
        | patches                                | PyTorch's default: uniform within 1 / sqrt(3 P^2)         |
        | norms                                  | gain 1, bias 0                                            |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.patch_embed.proj.reset_parameters()
        self._reset_norms()
        for vector in (*self.positions(), *self.prefix(1)):
            nn.init.trunc_normal_(vector, std=0.02)


@dataclass(frozen=True)
class DistilledConfig(ViTConfig):
    """As `ViTConfig`, of a model with a class token and a distillation token."""

    def __post_init__(self):
        super().__post_init__()
        if self.global_pool != "token":
            raise ValueError(
                f"global_pool is {self.global_pool!r}; heads of a model with two tokens each read their token"
            )

    @property
    def n_prefix(self) -> int:
        """E: class and distillation token."""
        return 2


class TwoTokenDeiT(DeiT):
    """A DeiT with a distillation token behind the class token; its one head reads the class token.

    That is what transformers' DeiTForImageClassification fine-tunes.
    """

    config: DistilledConfig

    def add_parts(self) -> None:
        """The distillation token; its position is the second row of `pos_embed`."""
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.config.embed_dim))

    def prefix(self, n_images: int) -> list[Tensor]:
        """Class and distillation token, each (B, 1, D)."""
        return [token.expand(n_images, -1, -1) for token in (self.cls_token, self.dist_token)]


class DistilledDeiT(TwoTokenDeiT):
    """A DeiT whose distillation token has a linear head of its own."""

    def add_parts(self) -> None:
        """Token and head of the distillation."""
        super().add_parts()
        if self.config.n_classes:
            self.head_dist = nn.Linear(self.config.embed_dim, self.config.n_classes)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class head and of the distillation head: (B, 3, R, R) float -> (B, C) each.

        Raises:
            ValueError: the model has no class heads.
        """
        self.require_head()
        hidden = self.hidden(x)
        return self.head(hidden[:, 0]), self.head_dist(hidden[:, 1])

    def together(self, of_classes: Tensor, of_distillation: Tensor) -> Tensor:
        """What both heads say, (B, C): the mean of their logits, as in the released code.

        The paper adds their probabilities (section 4); the likeliest class may differ.
        """
        return (of_classes + of_distillation) / 2

    def forward(self, x: Tensor) -> Tensor:
        """Class logits of both heads together: (B, 3, R, R) float -> (B, C)."""
        return self.together(*self.heads(x))
