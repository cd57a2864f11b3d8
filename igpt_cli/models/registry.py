"""From a name, or config.json's `model`, to a model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from igpt_cli.errors import FormatError, InputError, unknown
from igpt_cli.models import presets_conv, presets_swin, presets_vit
from igpt_cli.models.attention_conv import AttentionConv, AttentionConvConfig
from igpt_cli.models.deit import DeiT, DistilledConfig, DistilledDeiT, TwoTokenDeiT
from igpt_cli.models.igpt import IGPT, IGPTConfig
from igpt_cli.models.local_attention import LocalAttentionConfig, LocalAttentionNet
from igpt_cli.models.presets import PRESETS, Preset
from igpt_cli.models.resnet import ResNet, ResNetConfig
from igpt_cli.models.swin import Swin, SwinConfig
from igpt_cli.models.vit import ViT, ViTConfig

#: backend name -> (model class, config class). The config's fields are what config.json stores under "model".
BACKENDS: dict[str, tuple[type[nn.Module], type]] = {
    "igpt": (IGPT, IGPTConfig),
    "resnet": (ResNet, ResNetConfig),
    "local_attention": (LocalAttentionNet, LocalAttentionConfig),
    "attention_conv": (AttentionConv, AttentionConvConfig),
    "swin": (Swin, SwinConfig),
    "vit": (ViT, ViTConfig),
    "deit": (DeiT, ViTConfig),
    "deit_distilled": (DistilledDeiT, DistilledConfig),
    "deit_two_tokens": (TwoTokenDeiT, DistilledConfig),
}
#: Of a model with a head that learns from a teacher alone: the same without that head.
UNTAUGHT = {"deit_distilled": "deit_two_tokens"}
#: Settings of models of tokens alone.
OF_TOKENS = ("n_vocab", "objective")
#: Models of RGB images by name; those of tokens are `presets.PRESETS`.
RGB_PRESETS: dict[str, Preset] = {**presets_vit.PRESETS, **presets_swin.PRESETS, **presets_conv.PRESETS}


def all_presets() -> dict[str, Preset]:
    """Every preset by name: iGPT's, then those of models of RGB images."""
    return {**PRESETS, **RGB_PRESETS}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    known = all_presets()
    if name in known:
        return known[name]
    raise unknown("model", name, known, f"igpt models lists all {len(known)} that there are")


def check_of_tokens(name: str) -> None:
    """
    Raises:
        InputError: an unknown name, or that of a model of RGB images, which is not pretrained on pixels.
    """
    if not find_preset(name).of_tokens:
        raise InputError(f"{name} is a model of RGB images; it learns classes: igpt train {name}")


def model_config(name: str, **settings: Any) -> dict[str, Any]:
    """The full description of a model: the preset's sizes, with settings such as resolution or n_layer put over them.

    >>> model_config("igpt-tiny", resolution=32, n_layer=12)["n_layer"]
    12
    >>> model_config("vit-b16")["resolution"], model_config("vit-b16", resolution=384)["resolution"]
    (224, 384)

    Raises:
        InputError: an unknown name, a palette or an objective for a model of RGB images, or sizes that do not fit
            together.
    """
    preset = find_preset(name)
    if not preset.of_tokens and (wrong := [key for key in OF_TOKENS if key in settings]):
        raise InputError(
            f"{name} is a model of RGB images and has no {' and no '.join(wrong)}; it learns classes: igpt train {name}"
        )
    _, config_class = BACKENDS[preset.backend]
    known = [field.name for field in fields(config_class)]
    for key in settings:
        if key not in known:
            raise unknown(f"setting of {name}", key, known)
    try:
        config = config_class(**{**preset.sizes, **settings})
    except (TypeError, ValueError) as e:
        raise InputError(f"{name} cannot be built so: {e}") from e
    return {"name": name, "backend": preset.backend, **config.to_dict()}


def build_model(config: dict[str, Any]) -> nn.Module:
    """A freshly initialised model from what `model_config` returns (and config.json stores under "model").

    Raises:
        FormatError: an unknown backend, or settings that this version does not know.
    """
    model_class, sizes = _parsed(config)
    try:
        return model_class(sizes)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as e:
        raise FormatError(f"the model's configuration cannot be used: {e}") from e


def checked_config(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json stores under "model", with what it leaves out as `build_model` takes it.

    Raises:
        FormatError: as `build_model`, without building anything.
    """
    return {**_parsed(config)[1].to_dict(), **config}


def _parsed(config: dict[str, Any]) -> tuple[Any, Any]:
    """The class of a model, and its sizes."""
    sizes = {k: v for k, v in config.items() if k not in ("backend", "name")}
    backend = config.get("backend")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise FormatError(f"the model's backend is {backend!r}; this version of igpt knows: {', '.join(BACKENDS)}")
    model_class, config_class = BACKENDS[backend]
    try:
        return model_class, config_class(**sizes)
    except (TypeError, ValueError, ArithmeticError, LookupError) as e:
        raise FormatError(f"the model's configuration cannot be used: {e}") from e


def count_parameters(model: nn.Module) -> int:
    """Parameters, each counted once; works on the meta device."""
    return sum(p.numel() for p in model.parameters())
