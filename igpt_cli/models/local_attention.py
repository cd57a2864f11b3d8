"""Stand-alone self-attention: a ResNet whose 3x3 convolutions are local attention (Ramachandran et al. 2019).

The file follows "Stand-Alone Self-Attention in Vision Models", sections 2.2 and 3: each pixel looks at the k x k window
centred on it, with relative positions of rows and columns. Projections are dense (d x d), which gives the paper's
parameter counts; the formula of its text, a matrix for each head, would give fewer. The paper does not say what happens
at the border: here, a pixel looks only at what lies inside the image.

Shapes: B batch, D channels, N heads, K head width (D / N), T = H * W positions of a map, k side of the window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.models.resnet import STEMS, Bottleneck, ResNet, ResNetConfig, normalisation


class RelativePositions(nn.Module):
    """A learned vector for each offset of rows and one for each offset of columns, K / 2 numbers each for each head.

    r is the row's vector, then the column's, and enters as q . r: the first half of a head's query meets the row, the
    second the column (section 2.2).
    """

    def __init__(self, num_heads: int, head_dim: int, reach: int):
        """`reach` is the largest offset: there are 2 * reach + 1 of rows and as many of columns."""
        super().__init__()
        self.rows = nn.Parameter(torch.empty(num_heads, head_dim // 2, 2 * reach + 1))
        self.columns = nn.Parameter(torch.empty(num_heads, head_dim // 2, 2 * reach + 1))

    def forward(self, q: Tensor, offsets: Tensor) -> Tensor:
        """q . r for the queries of a square block and the keys of a square around it.

        Args:
            q: (..., N, b * b, K).
            offsets: (b, n) int64, of key row minus query row (and of columns alike), counted from 0.

        Returns:
            (..., N, b * b, n * n).
        """
        b, n = offsets.shape
        by_row, by_column = q.chunk(2, dim=-1)
        by_row = (by_row @ self.rows).unflatten(-2, (b, b))  # (..., N, b, b, 2 * reach + 1)
        by_column = (by_column @ self.columns).unflatten(-2, (b, b))
        shape = (*by_row.shape[:-1], n)
        by_row = by_row.gather(-1, offsets[:, None].expand(shape))  # the block's rows come first, then its columns
        by_column = by_column.gather(-1, offsets.expand(shape))
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(-4, -3).flatten(-2)


class LocalAttention(nn.Module):
    """y = sum over the window of softmax(q . k + q . r) v, for each head; no 1 / sqrt(K), no projection behind it.

    `probabilities` is the plain formula. `forward` is the same by blocks of at most 8 x 8 queries with the keys that
    any of them sees, as products of small matrices: for k = 7 and a map of 56 x 56 it holds 196 N + 6 D numbers for a
    pixel, where keys and values copied out window by window take 98 D.
    """

    def __init__(self, dim: int, num_heads: int, window: int, content: bool = True, relative: bool = True):
        """`content` and `relative`: whether the logits have q . k and q . r."""
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.query = nn.Conv2d(dim, dim, 1, bias=False)
        self.key = nn.Conv2d(dim, dim, 1, bias=False) if content else None
        self.value = nn.Conv2d(dim, dim, 1, bias=False)
        self.positions = RelativePositions(num_heads, dim // num_heads, window // 2) if relative else None

    def init_weights(self) -> None:
        """For W_V see `ResNet.init_weights`; W_Q lets the logits begin near variance 1, without 1 / sqrt(K) in them."""
        nn.init.kaiming_normal_(self.query.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            self.query.weight.mul_((len(self.query.weight) // self.num_heads) ** -0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions.rows)
            nn.init.normal_(self.positions.columns)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W) -> (B, D, H, W)
        H, W = x.shape[-2:]
        b, reach = block_side(H, W), self.window // 2
        h, w = -(-H // b), -(-W // b)  # blocks of a column, of a row
        n = b + 2 * reach  # side of the square of keys that a block sees

        def heads(x: Tensor, before: int, side: int) -> Tensor:  # (B, D, H, W) -> (B, h * w, N, side * side, K)
            x = F.pad(x, (before, w * b - W + before, before, h * b - H + before))
            x = x.unfold(2, side, b).unfold(3, side, b)  # (B, D, h, w, side, side)
            x = x.unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 5, 6, 2)
            return x.flatten(4, 5).flatten(1, 2)

        q, v = heads(self.query(x), 0, b), heads(self.value(x), reach, n)
        # Key c of the square is at row c - reach of the block: its offset from query a is c - a, counted from 0.
        offsets = torch.arange(n, device=x.device) - torch.arange(b, device=x.device)[:, None]  # (b, n)
        near = (offsets >= 0) & (offsets < self.window)
        offsets = offsets.clamp(0, self.window - 1)
        near = (near[:, None, :, None] & near[None, :, None, :]).reshape(b * b, n * n)
        inside = heads(torch.ones_like(x[:1, :1]).expand(1, self.num_heads, H, W), reach, n)[0, :, :1, :, 0] > 0
        logits = q.new_zeros(())
        if self.key is not None:
            logits = q @ heads(self.key(x), reach, n).mT  # (B, h * w, N, b * b, n * n)
        if self.positions is not None:
            logits = logits + self.positions(q, offsets)
        # Finite, for queries that only pad the last block may see nothing.
        logits = logits.masked_fill(~(near & inside[:, :, None]), torch.finfo(logits.dtype).min)
        y = logits.softmax(dim=-1).to(v.dtype) @ v  # (B, h * w, N, b * b, K)
        y = y.unflatten(1, (h, w)).unflatten(4, (b, b))  # (B, h, w, N, b, b, K)
        return y.permute(0, 3, 6, 1, 4, 2, 5).reshape(len(x), -1, h * b, w * b)[..., :H, :W]

    def window_flops(self, H: int, W: int) -> int:
        """FLOPs of the formula for a map of H x W: for each query k^2 keys, and k rows and k columns, each of K / 2.

        The k^2 are counted at the border, too. The blocks of `forward` also multiply with keys that no query sees:
        4 times as many for k = 7. That is a price of this implementation, and no part of the model.
        """
        D, k = len(self.query.weight), self.window
        products = 2 * k * k if self.key is not None else k * k  # q . k, and the sum of values
        return 2 * H * W * D * (products + (k if self.positions is not None else 0))

    def probabilities(self, x: Tensor) -> Tensor:
        """What each position looks at: (B, D, H, W) -> (B, N, T, T), 0 outside the window. Takes N * T^2 numbers."""
        H, W = x.shape[-2:]
        q = self.query(x).flatten(2).unflatten(1, (self.num_heads, -1)).mT  # (B, N, T, K)
        rows, columns = (t.flatten() for t in torch.meshgrid(*map(torch.arange, (H, W)), indexing="ij"))
        rows, columns = ((t - t[:, None]).to(x.device) + self.window // 2 for t in (rows, columns))  # (T, T), from 0
        far = (rows < 0) | (rows >= self.window) | (columns < 0) | (columns >= self.window)
        logits = q.new_zeros(())
        if self.key is not None:
            logits = q @ self.key(x).flatten(2).unflatten(1, (self.num_heads, -1))
        if self.positions is not None:
            by_row, by_column = q.chunk(2, dim=-1)
            for part, vectors, offsets in (
                (by_row, self.positions.rows, rows),
                (by_column, self.positions.columns, columns),
            ):
                part = part @ vectors  # (B, N, T, k)
                logits = logits + part.gather(-1, offsets.clamp(0, self.window - 1).expand(*part.shape[:3], -1))
        return logits.masked_fill(far, -torch.inf).softmax(dim=-1)


def block_side(H: int, W: int) -> int:
    """4 to 8: the side of blocks that cover H x W with the least beyond it, the largest of those that are alike.

    >>> block_side(56, 56), block_side(14, 14), block_side(4, 4)
    (8, 7, 4)
    """
    return min(range(8, 3, -1), key=lambda b: -(-H // b) * -(-W // b) * b * b)


class AttentionBottleneck(Bottleneck):
    """1x1, local attention, 1x1; where the convolution had stride 2, 2x2 average pooling follows (section 3.1)."""

    def __init__(self, d_in: int, width: int, stride: int, attention: LocalAttention):
        super().__init__(d_in, width, stride, "batch")
        # A side that is odd is halved upwards, as the shortcut does.
        pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.conv2 = nn.Sequential(attention, pool)

    def attention(self, x: Tensor) -> Tensor:
        """What each position looks at in this block: (B, D, H, W) -> (B, N, T, T)."""
        return self.conv2[0].probabilities(F.relu(self.norm1(self.conv1(x))))


class AttentionStem(nn.Module):
    """Attention within each 4x4 block of the image, batch norm, 4x4 max pooling (section 3.2, appendix A.1).

    Values depend on where in its block a pixel is: v_ab = sum over m of p(a, b, m) W_V^m x_ab, with p(a, b, m) the
    softmax over m of (row_a + column_b) . nu_m, the same for all heads. The paper does not say how many m there are;
    here there are 4.
    """

    side, num_heads, mixtures = 4, 4, 4

    def __init__(self, width: int):
        super().__init__()
        K = width // self.num_heads
        self.query = nn.Conv2d(3, width, 1, bias=False)
        self.key = nn.Conv2d(3, width, 1, bias=False)
        self.value = nn.Parameter(torch.empty(self.mixtures, width, 3))
        self.positions = RelativePositions(self.num_heads, K, self.side - 1)
        self.row = nn.Parameter(torch.empty(self.side, 1, K))
        self.column = nn.Parameter(torch.empty(self.side, K))
        self.nu = nn.Parameter(torch.empty(self.mixtures, K))
        self.norm = normalisation(width, "batch")
        self.pool = nn.MaxPool2d(self.side)

    def init_weights(self) -> None:
        """W_V^m as convolutions are, W_Q as in `LocalAttention`; vectors of positions normal, std 1, nu 1 / sqrt(K)."""
        D, K = len(self.query.weight), self.nu.shape[1]
        nn.init.normal_(self.value, std=(2 / D) ** 0.5)
        nn.init.kaiming_normal_(self.query.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            self.query.weight.mul_(K**-0.5)
        for vectors in (self.positions.rows, self.positions.columns, self.row, self.column):
            nn.init.normal_(vectors)
        nn.init.normal_(self.nu, std=K**-0.5)

    def mixed_values(self) -> Tensor:
        """W_V of each position of a block, (4 * 4, D, 3)."""
        p = ((self.row + self.column) @ self.nu.T).softmax(dim=-1)  # (4, 4, mixtures)
        return torch.einsum("abm,mdc->abdc", p, self.value).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, D, R / 4, R / 4)
        B, _, H, W = x.shape
        s, N = self.side, self.num_heads

        def heads(x: Tensor) -> Tensor:  # (B, D, H, W) -> (B, blocks, N, s * s, K)
            x = x.unflatten(1, (N, -1)).unflatten(-1, (W // s, s)).unflatten(3, (H // s, s))
            return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(1, 2)

        q, k = heads(self.query(x)), heads(self.key(x))
        pixels = F.pixel_unshuffle(x, s).unflatten(1, (3, s * s)).flatten(3)  # (B, 3, s * s, blocks)
        v = torch.einsum("pdc,bcpn->bnpd", self.mixed_values(), pixels)
        v = v.unflatten(3, (N, -1)).transpose(2, 3)  # (B, blocks, N, s * s, K)
        at = torch.arange(s, device=x.device)
        logits = q @ k.mT + self.positions(q, at - at[:, None] + s - 1)
        y = logits.softmax(dim=-1).to(v.dtype) @ v
        y = y.unflatten(1, (H // s, W // s)).unflatten(4, (s, s)).permute(0, 3, 6, 1, 4, 2, 5)
        return self.pool(self.norm(y.reshape(B, -1, H, W)))


@dataclass(frozen=True)
class LocalAttentionConfig(ResNetConfig):
    """Everything that decides the architecture: the fields of `ResNetConfig`, with bottlenecks, and these.

    stem: "attention", or one of a ResNet's.
    window: side k of the window, odd.
    num_heads: heads N of each local attention; the stem has 4.
    attention_stages: in which stages attention takes the convolution's place (the paper's table 3); None for all.
    content: whether logits have q . k (table 6).
    positions: "relative", or "none" (table 5).
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    block: str = "bottleneck"
    stem: str = "attention"
    window: int = 7
    num_heads: int = 8
    attention_stages: tuple[int, ...] | None = None
    content: bool = True
    positions: str = "relative"

    def __post_init__(self):
        super().__post_init__()
        stages = range(1, len(self.depths) + 1) if self.attention_stages is None else self.attention_stages
        object.__setattr__(self, "attention_stages", tuple(stages))
        if (self.block, self.norm) != ("bottleneck", "batch"):
            raise ValueError(
                f"block is {self.block!r} and norm {self.norm!r}; local attention needs 'bottleneck' and 'batch'"
            )
        if self.stem == "attention" and self.resolution % AttentionStem.side:
            raise ValueError(f"resolution {self.resolution} does not divide into the 4x4 blocks of the attention stem")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window is {self.window!r}, expected an odd number: it is centred on a pixel")
        self.check_whole("num_heads")
        heads = self.num_heads if self.stem != "attention" else max(self.num_heads, AttentionStem.num_heads)
        if self.width % (2 * heads):
            raise ValueError(f"width {self.width} does not divide into {heads} heads with halves for rows and columns")
        if not set(stages) <= set(range(1, len(self.depths) + 1)):
            raise ValueError(f"attention_stages are {tuple(stages)}, expected some of 1 to {len(self.depths)}")
        if self.positions not in ("relative", "none"):
            raise ValueError(f"positions is {self.positions!r}, expected 'relative' or 'none'")
        if not self.content and self.positions == "none":
            raise ValueError("without content and positions the logits are empty; give one of them")

    @property
    def stems(self) -> tuple[str, ...]:
        return ("attention", *STEMS)

    @property
    def stem_stride(self) -> int:
        return AttentionStem.side if self.stem == "attention" else super().stem_stride


class LocalAttentionNet(ResNet):
    """A ResNet with local attention in place of 3x3 convolutions, and of the stem (section 3)."""

    config: LocalAttentionConfig

    def new_stem(self) -> nn.Module:
        return AttentionStem(self.config.width) if self.config.stem == "attention" else super().new_stem()

    def new_block(self, stage: int, d_in: int, stride: int) -> Bottleneck:
        c, width = self.config, self.config.width * 2 ** (stage - 1)
        if stage not in (c.attention_stages or ()):
            return Bottleneck(d_in, width, stride, c.norm)
        attention = LocalAttention(width, c.num_heads, c.window, c.content, c.positions == "relative")
        return AttentionBottleneck(d_in, width, stride, attention)

    def init_weights(self) -> None:
        """As `ResNet.init_weights`, and what `LocalAttention` and `AttentionStem` say; the paper says nothing of it."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, (LocalAttention, AttentionStem)):
                module.init_weights()

    @property
    def attention_layers(self) -> list[int]:
        """The blocks that have attention."""
        return [layer for layer, block in enumerate(self.blocks) if isinstance(block, AttentionBottleneck)]

    def attention(self, x: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """With which probability each position looks at each: {layer: (B, N, T, T)}, query before key, in raster order.

        Args:
            x: (B, 3, R, R) float.
            layers: which of `attention_layers`; the pass stops at the deepest.

        Raises:
            ValueError: a layer that is not one of `attention_layers`.
        """
        requested = sorted(set(layers))
        if not set(requested) <= set(self.attention_layers):
            raise ValueError(f"layers {requested} requested; attention is in the layers {self.attention_layers}")
        return {layer: self.blocks[layer].attention(h) for layer, h in self.inputs(x, requested)}
