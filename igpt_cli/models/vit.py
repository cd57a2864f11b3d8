"""ViT: a transformer over the patches of an image (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").

The file follows section 3.1 and appendix D of the paper: patches become tokens by one linear map, a class token is put
before them, positions are added, and pre-norm blocks (equations 2 and 3) read the sequence. With `hybrid` the patches
are those of a ResNet's map.

Shapes: B batch, R resolution, P patch_size, n = R / P places on a side, N = n * n patches, E class and distillation
tokens in front of them, T = E + N tokens, D width (embed_dim), A heads (num_heads), K head width (D / A), L blocks
(depth), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.models.contract import POOLS, ModelConfig, RGBModel, block_inputs, check_attention, check_features
from igpt_cli.models.resnet import ResNet, ResNetConfig
from igpt_cli.models.stochastic_depth import StochasticDepth, depth_rates

#: How the place of a patch is encoded (appendix D.4).
POSITIONS = ("learned-1d", "2d", "relative", "none")


@dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """Everything that decides the architecture; the defaults are those of ViT-B/16.

    patch_size: P, pixels from one token to the next, those of the ResNet in a hybrid included.
    mlp_ratio: width of the MLP's hidden layer over D.
    global_pool: what the class head reads: "token", the class token, or "avg", the mean over patches; then there is no
        class token.
    pos_embed: "learned-1d", a vector for each token; "2d", one for the row and one for the column, of D / 2 each, which
        the class token has none of; "relative", in every block a vector for each distance in the sequence, which the
        query looks at in addition to the key; or "none".
    hybrid: residual blocks of each stage of the ResNet whose map is cut into patches (section 3.1), such as (3, 4, 9);
        () for its stem alone, None for a model of pixels.
    norm_eps: inside the root of the norms; weights of transformers may have 1e-12.
    drop_path_rate: of stochastic depth, for the last block; it grows from 0 by equal steps over all blocks.
    n_classes: C of the class head; None for a model without one.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    global_pool: str = "token"
    pos_embed: str = "learned-1d"
    hybrid: tuple[int, ...] | None = None
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    resolution: int = 224
    n_classes: int | None = None

    def __post_init__(self):
        self.check_whole("embed_dim", "depth", "num_heads", "patch_size", "resolution")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} does not divide into num_heads {self.num_heads} heads")
        if int(self.mlp_ratio * self.embed_dim) < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio!r}, which leaves no hidden layer")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps is {self.norm_eps!r}, expected a small number above 0")
        self.check_one_of("global_pool", ("token", "avg"))
        self.check_one_of("pos_embed", POSITIONS)
        if self.pos_embed == "2d" and self.embed_dim % 2:
            raise ValueError(f"embed_dim {self.embed_dim} is odd, and pos_embed '2d' halves it")
        if self.resolution % self.patch_size:
            near = sorted({max(1, self.resolution // self.patch_size), self.resolution // self.patch_size + 1})
            raise ValueError(
                f"resolution {self.resolution} does not divide into patches of {self.patch_size}; take "
                f"{' or '.join(str(n * self.patch_size) for n in near)}, or another patch_size"
            )
        if self.hybrid is not None:
            object.__setattr__(self, "hybrid", tuple(self.hybrid))
            stride = self.resnet().stride(len(self.hybrid))
            if self.patch_size % stride:
                raise ValueError(f"patch_size {self.patch_size} is not a multiple of the ResNet's stride, {stride}")
        depth_rates(self.drop_path_rate, 1)
        self.check_classes()

    @property
    def grid(self) -> int:
        """n, patches on a side of an image."""
        return self.resolution // self.patch_size

    @property
    def n_prefix(self) -> int:
        """E, tokens in front of the patches."""
        return int(self.global_pool == "token")

    def resnet(self) -> ResNetConfig:
        """The ResNet of a hybrid: bottlenecks, group normalisation, weight-standardised convolutions."""
        return ResNetConfig(self.hybrid or (), block="bottleneck", norm="group", resolution=self.resolution)


class PatchEmbed(nn.Module):
    """A linear map of each patch: of P x P pixels, or of the places of a ResNet's map."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.backbone: nn.Module = nn.Identity()
        channels, patch = 3, config.patch_size
        if config.hybrid is not None:
            resnet, stage = config.resnet(), len(config.hybrid)
            self.backbone = ResNet(resnet)
            channels, patch = resnet.channels(stage), patch // resnet.stride(stage)
        self.proj = nn.Conv2d(channels, config.embed_dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, N, D)
        x = self.backbone.feature_map(x) if isinstance(self.backbone, ResNet) else x
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V for every head (appendix A).

    With `offsets` each query also looks at a vector r for the distance to the key: Q (K + r)^T in place of Q K^T. The
    heads share the vectors.
    """

    def __init__(self, dim: int, num_heads: int, offsets: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)  # rows: query, key, value
        self.proj = nn.Linear(dim, dim)
        if offsets:
            self.offsets = nn.Parameter(torch.empty(offsets, dim // num_heads))  # from -(T - 1) to T - 1

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, D) -> each (B, A, T, K)
        """Query, key and value."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def relative(self, q: Tensor) -> Tensor | None:  # (B, A, T, K) -> (B, A, T, T)
        """What distances add to the scores, or None."""
        if not hasattr(self, "offsets"):
            return None
        T = q.shape[2]
        place = torch.arange(T, device=q.device)
        distance = place[:, None] - place + T - 1
        scores = q @ self.offsets.to(q.dtype).T / math.sqrt(q.shape[-1])  # (B, A, T, 2 T - 1)
        return scores.gather(-1, distance.expand(*q.shape[:2], T, T))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.relative(q))
        return self.proj(y.transpose(1, 2).flatten(2))

    def probabilities(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, A, T, T)
        """With which probability each token looks at each: the plain formula."""
        q, k, _ = self.split(x)
        scores, relative = q @ k.mT / math.sqrt(q.shape[-1]), self.relative(q)
        return (scores if relative is None else scores + relative).softmax(dim=-1)


class MLP(nn.Module):
    """D -> mlp_ratio D -> D around GELU, the exact one."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x' = attention(norm1(x)) + x;  x'' = mlp(norm2(x')) + x'   (equations 2 and 3)."""

    def __init__(self, config: ViTConfig, drop_path_rate: float):
        super().__init__()
        D, tokens = config.embed_dim, config.n_prefix + config.grid**2
        self.norm1 = nn.LayerNorm(D, config.norm_eps)
        self.attn = Attention(D, config.num_heads, 2 * tokens - 1 if config.pos_embed == "relative" else None)
        self.norm2 = nn.LayerNorm(D, config.norm_eps)
        self.mlp = MLP(D, int(config.mlp_ratio * D))
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(RGBModel):
    """Patches, class token, positions, blocks, the last norm, a linear class head (equations 1 to 4)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        D, n = config.embed_dim, config.grid
        self.patch_embed = PatchEmbed(config)
        if config.n_prefix:
            self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        if config.pos_embed == "learned-1d":
            self.pos_embed = nn.Parameter(torch.empty(1, config.n_prefix + n * n, D))
        elif config.pos_embed == "2d":
            self.pos_embed_rows = nn.Parameter(torch.empty(1, n, 1, D // 2))
            self.pos_embed_columns = nn.Parameter(torch.empty(1, 1, n, D // 2))
        self.blocks: Any = nn.ModuleList(
            Block(config, rate) for rate in depth_rates(config.drop_path_rate, config.depth)
        )
        self.norm = nn.LayerNorm(D, config.norm_eps)
        if config.n_classes:
            self.head = nn.Linear(D, config.n_classes)
        self.add_parts()
        self.init_weights()

    def add_parts(self) -> None:
        """Make the further parts of a model built on this one, before initial values are set."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values of the paper's code.

        | tensor                           | value                                                              |
        |----------------------------------|--------------------------------------------------------------------|
        | query, key, value, proj, fc1, fc2| uniform (Glorot and Bengio 2010), of each D x D map on its own     |
        | biases of fc1, fc2               | normal, std 1e-6                                                   |
        | other biases                     | 0                                                                  |
        | patches                          | normal, variance 1 over the numbers in a patch, cut at two stds    |
        | class token                      | 0                                                                  |
        | positions, offsets               | normal, std 0.02                                                   |
        | norms                            | gain 1, bias 0                                                     |
        | class head                       | 0: the first loss is ln C                                          |
        """
        for block in self.blocks:
            for part in block.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
            for linear in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
            for linear in (block.attn.qkv, block.attn.proj):
                nn.init.zeros_(linear.bias)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.normal_(linear.bias, std=1e-6)
        proj: Any = self.patch_embed.proj
        # A normal that is cut at two standard deviations has 0.8796 of its own.
        std = proj.weight[0].numel() ** -0.5 / 0.87962566
        nn.init.trunc_normal_(proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(proj.bias)
        self._reset_norms()
        for position in self.positions():
            nn.init.normal_(position, std=0.02)
        if self.config.n_prefix:
            nn.init.zeros_(self.cls_token)
        if self.config.n_classes:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def _reset_norms(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ResNet):
                module.init_weights()

    def positions(self) -> list[nn.Parameter]:
        """The parameters that encode where a patch lies."""
        return [p for name, p in self.named_parameters() if "pos_embed" in name or name.endswith(".offsets")]

    @property
    def n_layers(self) -> int:
        """L. Features exist for the layers 0..L: the normed input of block l, and the final norm at L."""
        return self.config.depth

    def prefix(self, n_images: int) -> list[Tensor]:
        """The tokens in front of the patches, each (B, 1, D)."""
        return [self.cls_token.expand(n_images, -1, -1)] if self.config.n_prefix else []

    def embed(self, x: Tensor) -> Tensor:
        """What enters block 0: (B, 3, R, R) float -> (B, T, D).

        Raises:
            ValueError: images of another size, for which `resize_positions` makes weights.
        """
        R = self.config.resolution
        if x.shape[-2:] != (R, R):
            raise ValueError(
                f"images of {x.shape[-2]}x{x.shape[-1]}, and this model has positions for {R}x{R}; resize_positions "
                f"makes weights for others"
            )
        x = self.patch_embed(x)
        if self.config.pos_embed == "2d":
            n = self.config.grid
            both = (self.pos_embed_rows.expand(1, n, n, -1), self.pos_embed_columns.expand(1, n, n, -1))
            x = x + torch.cat(both, dim=-1).flatten(1, 2)
        x = torch.cat([*(token.to(x.dtype) for token in self.prefix(len(x))), x], dim=1)
        return x + self.pos_embed if self.config.pos_embed == "learned-1d" else x

    def hidden(self, x: Tensor) -> Tensor:
        """The output of the final norm: (B, 3, R, R) float -> (B, T, D)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, D)
        """The class token, or the mean over patches, of the final norm's output."""
        hidden = self.hidden(x)
        return hidden[:, 0] if self.config.global_pool == "token" else hidden.mean(dim=1)

    def inputs(self, x: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(layer, (B, T, D)): what enters the blocks."""
        return block_inputs(self.embed(x), self.blocks, layers)

    def normed(self, layer: int, h: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """The normed input of the block; of L, the output of the final norm."""
        return self.blocks[layer].norm1(h) if layer < self.n_layers else self.norm(h)

    def features(self, x: Tensor, layers: Iterable[int], pool: str = "mean") -> dict[int, Tensor]:
        """As `RGBModel.features`, with "mean", "max" and "quadrants" over patches alone, and "last" the class token.

        "none" gives all tokens (B, T, D): class token, distillation token, patches in raster order.
        """
        E, out = self.config.n_prefix, {}
        for layer, h in self.inputs(x, check_features(layers, self.n_layers, pool, last=E > 0)):
            n = self.normed(layer, h)
            out[layer] = n[:, 0] if pool == "last" else n if pool == "none" else POOLS[pool](n[:, E:])
        return out

    def attention(self, x: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """With which probability each token looks at each: {layer: (B, A, T, T)}, query before key; rows sum to 1.

        Args:
            x: (B, 3, R, R) float.
            layers: which of the blocks 0..L - 1; the pass stops at the deepest.

        Raises:
            ValueError: a layer outside 0..L - 1.
        """
        entering = self.inputs(x, check_attention(layers, self.n_layers))
        return {layer: self.blocks[layer].attn.probabilities(self.normed(layer, h)) for layer, h in entering}


def resize_grid(grid: Tensor, rows: int, columns: int) -> Tensor:
    """(n, m, D) -> (rows, columns, D): bicubic, as DeiT and transformers resize positions, without antialiasing."""
    if grid.shape[:2] == (rows, columns):
        return grid
    picture = grid.permute(2, 0, 1)[None].float()
    picture = F.interpolate(picture, size=(rows, columns), mode="bicubic", align_corners=False)
    return picture[0].permute(1, 2, 0).contiguous().to(grid.dtype)


def resize_positions(weights: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Weights of a ViT (its state dict) with positions for the resolution of `config` (section 3.2).

    Those of patches are resized as a picture; those of class and distillation token stay. Patches keep their size.

    Raises:
        ValueError: relative positions, which are no picture; or positions that are no square grid.
    """
    out, n, E = dict(weights), config.grid, config.n_prefix
    if config.pos_embed == "relative":
        raise ValueError("relative positions are distances in a sequence, which another image size gives another sense")
    for key, rows, columns in (("pos_embed_rows", n, 1), ("pos_embed_columns", 1, n)):
        if key in out:
            out[key] = resize_grid(out[key][0], rows, columns)[None]
    if "pos_embed" in out:
        before, patches = out["pos_embed"][:, :E], out["pos_embed"][:, E:]
        side = math.isqrt(patches.shape[1])
        if side**2 != patches.shape[1]:
            raise ValueError(
                f"pos_embed has {patches.shape[1]} rows after {E} for tokens, which is no square grid of patches"
            )
        grid = resize_grid(patches[0].unflatten(0, (side, side)), n, n)
        out["pos_embed"] = torch.cat([before, grid.flatten(0, 1)[None]], dim=1)
    return out
