"""The ablations as data: models, question, the papers' findings.

Published numbers are top-1 percent on ImageNet unless the column says otherwise; where a paper has a statement and no
number, the statement stands there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from igpt_cli.errors import unknown

#: How a run is trained: with labels, on pixels alone, or fine-tuned from another run.
TRAIN, PRETRAIN, FINETUNE = "train", "pretrain", "finetune"
SIZES = ("small", "full")


@dataclass(frozen=True)
class AblationRun:
    """One model of an ablation; `name` is its folder.

    model: which of the models of a `Size`. sizes: override its own. settings: of the task `how`. after: the run that is
    its teacher, or that it is fine-tuned from. seed: added to the ablation's. paper: {column: published result}.
    against: the run that the findings compare it with.
    """

    name: str
    label: str
    model: str
    how: str = TRAIN
    sizes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None
    seed: int = 0
    paper: Mapping[str, float | str] = field(default_factory=dict)
    against: str | None = None


@dataclass(frozen=True)
class Size:
    """How large an ablation is.

    models: {name in `AblationRun.model`: (preset, sizes that override its own)}. amount: steps or epochs of each run.
    settings: {how: settings}. probe: training and test images of probes; None for all. minutes: estimated duration, of
    "small" from steps timed on one core.
    """

    models: Mapping[str, tuple[str, Mapping[str, Any]]]
    amount: Mapping[str, Any]
    minutes: float
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    probe: tuple[int | None, int | None] = (500, 300)


@dataclass(frozen=True)
class Ablation:
    """One question of a paper.

    paper, table: who asked, and where the answer stands. trains: what, in words. published: what the paper's numbers
    are of. differs: what is another than in the paper, whatever the size.
    """

    name: str
    question: str
    paper: str
    table: str
    trains: str
    published: str
    small: Size
    full: Size
    runs: tuple[AblationRun, ...] = ()
    differs: tuple[str, ...] = ()

    def size(self, name: str) -> Size:
        """The size of that name, one of `SIZES`."""
        return self.small if name == "small" else self.full

    @property
    def hows(self) -> set[str]:
        """How its runs are trained."""
        return {run.how for run in self.runs}


VIT, DEIT, SWIN = "Dosovitskiy et al. 2021 (ViT)", "Touvron et al. 2021 (DeiT)", "Liu et al. 2021 (Swin)"
IGPT = "Chen et al. 2020 (iGPT)"
_DIM_96: dict[str, Any] = {"embed_dim": 96, "depth": 4}
_FEW_TESTS: dict[str, dict[str, Any]] = {TRAIN: {"test_images": 1000}}

POSITIONS = Ablation(
    name="positions",
    question="Does a ViT need to know where its patches lie, and in which form?",
    paper=VIT,
    table="table 8",
    trains="4 ViTs",
    published="ViT-B/16, 5-shot linear accuracy on ImageNet",
    small=Size({"vit": ("vit-ti-32", _DIM_96)}, {"steps": 300}, 5, _FEW_TESTS),
    full=Size({"vit": ("vit-ti-32", {})}, {"epochs": 20}, 10),
    runs=tuple(
        AblationRun(
            kind,
            label,
            "vit",
            sizes={"pos_embed": kind},
            paper={"ImageNet 5-shot": paper},
            against=None if kind == "none" else "none",
        )
        for kind, label, paper in (
            ("none", "none", 61.4),
            ("learned-1d", "learned, 1-D", 64.2),
            ("2d", "learned, 2-D", 64.0),
            ("relative", "relative", 64.0),
        )
    ),
    differs=(
        "trained with labels and tested on the same kind of images, where the paper probes with 5 labels a class",
    ),
)


def _student(
    name: str, label: str, model: str, teacher: str | None, distill: str, *paper: float | str | None, against="none"
) -> AblationRun:
    columns = ("DeiT-Ti, table 3", "DeiT-B, table 3", "DeiT-B, table 2")
    found = {column: value for column, value in zip(columns, paper) if value is not None}
    return AblationRun(
        name, label, model, settings={"distill": distill}, after=teacher, paper=found, against=teacher and against
    )


DISTILLATION = Ablation(
    name="distillation",
    question="Does a teacher help a DeiT: which one, soft or hard, with a token?",
    paper=DEIT,
    table="tables 2 and 3",
    trains="2 teachers, 7 DeiTs",
    published="students of 300 epochs on ImageNet, taught by RegNetY-16GF or by DeiT-B; the token's row is both heads",
    small=Size(
        {
            "resnet": ("resnet-18-32", {"width": 16, "depths": (1, 1, 1)}),
            "student": ("deit-ti-32", _DIM_96),
            "distilled": ("deit-ti-distilled-32", _DIM_96),
        },
        {"steps": 200},
        9,
        _FEW_TESTS,
    ),
    full=Size(
        {
            "resnet": ("resnet-18-32", {}),
            "student": ("deit-ti-32", {}),
            "distilled": ("deit-ti-distilled-32", {}),
        },
        {"epochs": 20},
        25,
    ),
    runs=(
        AblationRun("teacher-resnet", "teacher: ResNet", "resnet", paper={"DeiT-B, table 2": 82.9}),
        AblationRun("teacher-transformer", "teacher: DeiT", "student", seed=1, paper={"DeiT-B, table 2": 81.8}),
        _student("none", "no distillation", "student", None, "none", 72.2, 81.8),
        _student("soft-resnet", "soft, ResNet", "student", "teacher-resnet", "soft", 72.2, 81.8),
        _student("hard-resnet", "hard, ResNet", "student", "teacher-resnet", "hard", 74.3, 83.0),
        _student("token-resnet", "hard with token, ResNet", "distilled", "teacher-resnet", "hard", 74.5, 83.4, 83.1),
        _student("soft-transformer", "soft, DeiT", "student", "teacher-transformer", "soft"),
        _student("hard-transformer", "hard, DeiT", "student", "teacher-transformer", "hard"),
        _student(
            *("token-transformer", "hard with token, DeiT", "distilled", "teacher-transformer", "hard"),
            *(None, None, 81.9),
            against="token-resnet",
        ),
    ),
    differs=(
        "a ResNet in place of the paper's RegNetY; the DeiT that teaches has the student's size and another seed",
        "teachers are trained as long as students, not to their best",
    ),
)
SHIFT = Ablation(
    name="shift",
    question="Do a Swin's windows need to shift?",
    paper=SWIN,
    table="table 4",
    trains="2 Swins",
    published="Swin-T: top-1 on ImageNet, box AP on COCO, mIoU on ADE20K",
    small=Size(
        {"swin": ("swin-t-32", {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)})},
        *({"steps": 300}, 2, _FEW_TESTS),
    ),
    full=Size({"swin": ("swin-t-32", {})}, {"epochs": 20}, 10),
    runs=(
        AblationRun(
            *("no-shift", "windows stay", "swin"),
            sizes={"shift": False},
            paper={"ImageNet": 80.2, "COCO": 47.7, "ADE20K": 43.3},
        ),
        AblationRun(
            *("shift", "windows shift", "swin"),
            paper={"ImageNet": 81.3, "COCO": 50.5, "ADE20K": 46.1},
            against="no-shift",
        ),
    ),
    differs=(
        "patches of 2 pixels and windows of 4 patches, where the paper has 4 and 7; classes alone are told apart",
    ),
)
_PIXELS: dict[str, Any] = {
    "models": {"igpt": ("igpt-tiny", {"n_layer": 6})},
    "settings": {PRETRAIN: {"val_images": 32}, FINETUNE: {"val_images": 32, "test_images": 200}},
}
_PIXELS_FULL: dict[str, Any] = {"models": {"igpt": ("igpt-xs", {})}, "amount": {"steps": 6000}, "probe": (None, None)}
OBJECTIVE = Ablation(
    name="objective",
    question="Next pixel or masked pixels: which gives the better features?",
    paper=IGPT,
    table="section 4.6, figure 4",
    trains="2 iGPTs, each fine-tuned",
    published="iGPT-L at 32x32, pretrained on ImageNet: probe of the best layer, and fine-tuned, as the text says it",
    small=Size(amount={"steps": 200}, minutes=7, **_PIXELS),
    full=Size(minutes=40, **_PIXELS_FULL),
    runs=(
        AblationRun(
            *("gpt", "next pixel, probed", "igpt", PRETRAIN),
            settings={"objective": "ar"},
            paper={"CIFAR-10": 96.3, "ImageNet": 60.3},
        ),
        AblationRun(
            *("bert", "masked pixels, probed", "igpt", PRETRAIN),
            settings={"objective": "bert"},
            paper={"CIFAR-10": "more than 1 lower", "ImageNet": "6 lower"},
            against="gpt",
        ),
        AblationRun(
            *("gpt-finetuned", "next pixel, fine-tuned", "igpt", FINETUNE),
            after="gpt",
            paper={"CIFAR-10": 99.0, "ImageNet": 66.3},
        ),
        AblationRun(
            *("bert-finetuned", "masked pixels, fine-tuned", "igpt", FINETUNE),
            after="bert",
            paper={"CIFAR-10": 98.6, "ImageNet": 66.5},
            against="gpt-finetuned",
        ),
    ),
    differs=(
        "both have the learning rate of igpt-tiny or igpt-xs that was found for the next pixel",
        "fine-tuned for as many steps as pretrained",
    ),
)
#: Rows of the ablation "layer", which has one model: what the paper says of the layers of iGPT-L on CIFAR-10 (section
#: 4.1, figure 2); "2.4 less" is the text's, no other number is printed.
LAYER_ROWS: dict[str, float | str] = {"best": 96.3, "first": "lower", "middle": "about the best", "last": "2.4 less"}
LAYER = Ablation(
    name="layer",
    question="Which layer of a pixel model classifies best?",
    paper=IGPT,
    table="section 4.1, figure 2",
    trains="1 iGPT, or none with --run",
    published="iGPT-L at 32x32, pretrained on ImageNet, 48 blocks; the curve has one peak, around the middle",
    small=Size(amount={"steps": 400}, minutes=4, **_PIXELS),
    full=Size(minutes=20, **_PIXELS_FULL),
    runs=(AblationRun("gpt", "next pixel", "igpt", PRETRAIN, settings={"objective": "ar"}),),
)
WINDOW_COST = Ablation(
    name="window-cost",
    question="What does attention in windows save as the image grows?",
    paper=SWIN,
    table="section 3.2, equations 1 and 2",
    trains="nothing; one layer is timed",
    published="the number of multiply-adds of a layer, as equations",
    small=Size({}, {"steps": 5}, 1),
    full=Size({}, {"steps": 20}, 1),
    differs=(
        "the forward pass of one layer, without the MLP; the equations leave out the softmax and what memory costs",
    ),
)

ABLATIONS: dict[str, Ablation] = {a.name: a for a in (POSITIONS, DISTILLATION, SHIFT, WINDOW_COST, OBJECTIVE, LAYER)}


def find_ablation(name: str) -> Ablation:
    """The ablation of that name. Raises InputError with the known names and the nearest."""
    if name in ABLATIONS:
        return ABLATIONS[name]
    raise unknown("ablation", name, ABLATIONS)


def listing() -> list[dict[str, Any]]:
    """One object an ablation: name, question, paper, table, trains, minutes_cpu, minutes_gpu (both estimated)."""
    keys = ("name", "question", "paper", "table", "trains")
    return [
        {**{k: getattr(a, k) for k in keys}, "minutes_cpu": a.small.minutes, "minutes_gpu": a.full.minutes}
        for a in ABLATIONS.values()
    ]
