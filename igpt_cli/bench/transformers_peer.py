"""transformers' ImageGPT at the same shapes, for benchmarks alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_cli.errors import InputError
from igpt_cli.interop.huggingface import _their_config, _to_theirs


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
#: Ways to draw images with it. Its static cache is not among them: this model would attend to places of the cache that
#: are still empty, and draw other images.
SAMPLERS = {"transformers": Kind(), "transformers-float32": Kind(precision="float32")}
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
    """Raises InputError if transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise InputError("to measure against transformers, it has to be installed: pip install 'igpt-cli[test]'") from e


def build_peer(config: dict[str, Any], name: str) -> tuple[Peer, str]:
    """The peer of that name with random weights, at the shapes of an AR `model_config`, and the attention that it
    uses.
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
    model, attention = _with_fastest_attention(ImageGPTForCausalImageModeling, theirs)
    if kind.compiled:
        model.forward = torch.compile(model.forward)
    return Peer(model, sos=config["n_vocab"]), attention


def _with_fastest_attention(model_class: Any, theirs: Any) -> tuple[Any, str]:
    """Their model, with random weights, and the attention that it uses."""
    for attention in ATTENTION[:-1]:
        try:
            return model_class._from_config(theirs, attn_implementation=attention), attention
        except (ValueError, ImportError):
            continue
    return model_class._from_config(theirs, attn_implementation=ATTENTION[-1]), ATTENTION[-1]


def build_sampler(config: dict[str, Any], weights: Mapping[str, Tensor], precision: str, device: torch.device) -> Any:
    """transformers' model with our weights (the state dict of an AR model of that config), for `generate`."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    with device:
        theirs = ImageGPTConfig(**_their_config(config, precision))
        model, _ = _with_fastest_attention(ImageGPTForCausalImageModeling, theirs)
    model.load_state_dict(_to_theirs(weights, config))
    return model.to(device, getattr(torch, precision)).eval()


def generate(model: Any, n: int, pixels: int, greedy: bool = False) -> Tensor:
    """Draw the first `pixels` of n images with its cache, temperature 1 and no truncation: (n, pixels) int64, on the
    CPU.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=pixels,
        use_cache=True,
        **({"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    start = torch.full((n, 1), model.config.vocab_size - 1, device=model.device)
    return model.generate(start, generation_config=settings)[:, 1:].cpu()
