"""transformers' ImageGPT at the same shapes, to be measured beside ours. It is needed for that alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.errors import InputError


@dataclass(frozen=True)
class Kind:
    """A way to measure it. precision: None for igpt's own. dropout: its configuration's default of 0.1, or none."""

    precision: str | None = None
    dropout: bool = False
    compiled: bool = False


#: By name: the same arithmetic as ours; the same under torch.compile; in float32 whatever ours is in; as it comes.
PEERS = {
    "transformers": Kind(),
    "transformers-compiled": Kind(compiled=True),
    "transformers-float32": Kind(precision="float32"),
    "transformers-as-is": Kind(precision="float32", dropout=True),
}
#: In the order of their speed; the first that this version of transformers takes is used.
ATTENTION = ("flash_attention_2", "sdpa", "eager")


class Peer(nn.Module):
    """transformers' model with its loss, called as `training.objectives.Objective` is."""

    def __init__(self, model: nn.Module, sos: int):
        super().__init__()
        self.model, self.sos = model, sos

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 in [0, V) -> the loss of each image, (B,) float32, nats per token."""
        seen = F.pad(tokens[:, :-1], (1, 0), value=self.sos)
        logits = self.model(seen, use_cache=False).logits.float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape).mean(1)


def require_transformers() -> None:
    """
    Raises:
        InputError: transformers is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise InputError("to measure against transformers, it has to be installed: pip install 'igpt-cli[test]'") from e


def build_peer(config: dict[str, Any], name: str) -> tuple[Peer, str]:
    """The peer of that name with random weights, and the attention that it uses.

    Args:
        config: from `model_config`, of an AR model.
    """
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    kind = PEERS[name]
    dropout: dict[str, Any] = {} if kind.dropout else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = ImageGPTConfig(
        vocab_size=config["n_vocab"] + 1,
        n_positions=config["resolution"] ** 2,
        n_embd=config["n_embd"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        **dropout,
    )
    for attention in ATTENTION:
        try:
            model = ImageGPTForCausalImageModeling._from_config(theirs, attn_implementation=attention)
            break
        except (ValueError, ImportError):
            if attention == ATTENTION[-1]:
                raise
    if kind.compiled:
        model.forward = torch.compile(model.forward)
    return Peer(model, sos=config["n_vocab"]), attention
