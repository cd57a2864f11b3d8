"""Completion candidates for options and arguments: callbacks for `autocompletion=`, without torch."""

from __future__ import annotations

from igpt_cli.workspace import BUILTIN, RUNS, builtin_models

#: A value and what it is, in a few words.
Candidate = tuple[str, str]


def own_runs() -> list[Candidate]:
    """The runs of the workspace, and the newest."""
    runs = sorted(path.parent for path in RUNS.glob("*/config.json"))
    latest = [("latest", "the newest run")] if (RUNS / "latest").is_file() else []
    return [*((str(path), "run") for path in runs), *latest]


def runs() -> list[Candidate]:
    """The runs of the workspace, and the models that ship with igpt."""
    return [*own_runs(), *((BUILTIN + name, "ships with igpt") for name in builtin_models())]


def splits() -> list[Candidate]:
    """The usual names of splits."""
    return [("train", "training images"), ("val", "held-out images"), ("test", "test images")]


def all_models() -> list[Candidate]:
    """All models by name."""
    return [*token_models(), *rgb_models()]


def token_models() -> list[Candidate]:
    """The models of tokens by name."""
    from igpt_cli.models.presets import PRESETS

    return [(name, preset.about) for name, preset in PRESETS.items()]


def rgb_models() -> list[Candidate]:
    """The models of RGB images by name."""
    from igpt_cli.models import presets_conv, presets_swin, presets_vit

    presets = {**presets_vit.PRESETS, **presets_swin.PRESETS, **presets_conv.PRESETS}
    return [(name, preset.about) for name, preset in presets.items()]


def rgb_models_and_runs() -> list[Candidate]:
    """What `igpt train` starts from: a model of RGB images by name, or a run."""
    return [*rgb_models(), *own_runs()]


def gpus() -> list[Candidate]:
    """GPUs with their memory."""
    from igpt_cli.planning.gpus import GPUS

    return [(name, f"{gpu.memory} GB") for name, gpu in GPUS.items()]


def ablations() -> list[Candidate]:
    """Ablations with their questions."""
    from igpt_cli.ablations.catalogue import ABLATIONS

    return [(name, ablation.question) for name, ablation in ABLATIONS.items()]
