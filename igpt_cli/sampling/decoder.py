"""Decode an autoregressive IGPT pixel by pixel, with a key-value cache.

Shapes: B rows (images drawn at a time), T positions, D width, V palette size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from igpt_cli.models.igpt import IGPT
from igpt_cli.sampling.blocks import Blocks, CachedBlocks
from igpt_cli.sampling.cpu_blocks import CPUBlocks
from igpt_cli.sampling.draw import SamplingParams, draw, require_finite, uniform_dtype

#: On a GPU, attention reads the cache up to the next multiple of this: a CUDA graph is made for each.
BUCKET = 128
#: On a CPU, rows are added up to a multiple of this: a matrix product of fewer rows rounds in another way, and images
#: would depend on how many are drawn.
CPU_ROWS = 8


class Decoder:
    """Draw B images at once. Position t reads pixel t - 1 (sos at 0) and predicts pixel t.

    Matrices, keys and values are in `precision`; the residual stream, norms, softmax and logits in float32, as under
    autocast.

    Args:
        model: with objective "ar".
        rows: B; on a CPU rounded up to a multiple of CPU_ROWS.
        fixed_lengths: let attention read the cache in whole buckets, and record steps as CUDA graphs where there is
            CUDA; default on a GPU. On a CPU it computes as a GPU would.

    Attributes:
        inputs: (B, T + 1) int64; column t enters position t, so the image is in [:, 1:].
        uniforms: (B, T) in [0, 1); column t draws pixel t.
    """

    def __init__(
        self,
        model: IGPT,
        rows: int,
        precision: str = "float32",
        params: SamplingParams | None = None,
        fixed_lengths: bool | None = None,
    ):
        c, device = model.config, model.wpe.device
        rows = -(-rows // CPU_ROWS) * CPU_ROWS if device.type == "cpu" else rows
        self.n_ctx, self.params, self.precision = c.n_ctx, params or SamplingParams(), precision
        self.fixed_lengths = device.type == "cuda" if fixed_lengths is None else fixed_lengths
        self.blocks: CachedBlocks
        if device.type == "cpu" and not self.fixed_lengths:
            self.blocks = CPUBlocks(model, rows, getattr(torch, precision))
        else:
            self.blocks = Blocks(model, rows, getattr(torch, precision), self.fixed_lengths)
        self.embedding = torch.cat((model.wte.weight, model.sos[None])).detach()  # (V + 1, D): token V is sos
        self.wpe = model.wpe.detach()
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
        """Draw what follows the first `given` pixels of at most B images.

        Args:
            tokens: (b, T) int64; values from `given` on are ignored.
            streams: the random numbers of each image; T are taken.
            progress: called with the pixels drawn since the last call.

        Returns:
            (b, T) int64 tokens, and (b, T) int64 the place in which each was drawn, from 1, 0 = given.

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
        self.blocks.prefill(rows, self.embedding[self.inputs[rows.start, :t]] + self.wpe[:t])

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
        tokens = draw(logits, self.uniforms.index_select(1, self.at).squeeze(1), self.params)
        self.inputs.index_copy_(1, self.at + 1, tokens[:, None])

    def _logits(self, length: int) -> Tensor:
        """(B, V) float32 at position `self.at`, which is below `length`: so much of the cache is read."""
        h = self.embedding[self.inputs.index_select(1, self.at).squeeze(1)] + self.wpe.index_select(0, self.at)
        return self.blocks.logits(h, self.at, length)


def _equal_rows(prefixes: Tensor) -> list[slice]:
    """Stretches of rows that begin alike, such as the completions of one image: (b, t) -> slices of the b rows."""
    changes = (prefixes[1:] != prefixes[:-1]).any(1).nonzero()[:, 0] + 1
    return [slice(a, b) for a, b in pairwise([0, *changes.tolist(), len(prefixes)])]


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded: one for all, for cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)
