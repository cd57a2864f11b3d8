"""Settings: declared once, they are checked, written to config.json and read again, and are the commands' options."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from igpt_cli.cli.finetune import finetune
from igpt_cli.cli.pretrain import pretrain
from igpt_cli.cli.train import train
from igpt_cli.documents import read_json
from igpt_cli.errors import FormatError, InputError
from igpt_cli.model_dir import task_of
from igpt_cli.training.run import TASKS
from igpt_cli.training.settings import (
    Execution,
    FinetuneSettings,
    LearningSettings,
    PretrainSettings,
    ResolvedPretrain,
    TrainSettings,
    architecture,
    check,
    declared,
    from_config,
    resolved,
    split_settings,
    to_config,
)

COMMANDS = [(pretrain, PretrainSettings), (finetune, FinetuneSettings), (train, TrainSettings)]
KINDS = [kind for _, kind in COMMANDS]


@pytest.mark.parametrize(("command", "kind"), COMMANDS, ids=["pretrain", "finetune", "train"])
def test_each_setting_is_an_option_of_its_command(command, kind):
    parameters = inspect.signature(command).parameters
    for field, setting in [*declared(kind), *declared(Execution)]:
        assert (field.name in parameters) == setting.option, field.name
        if setting.option:
            assert parameters[field.name].default is None, field.name
    assert "settings" not in parameters


@pytest.mark.parametrize("kind", [*KINDS, Execution])
def test_each_field_is_declared_and_its_default_passes(kind):
    assert [f.name for f in fields(kind)] == [f.name for f, _ in declared(kind)]
    check(kind())


def test_every_problem_is_named_at_once():
    bad = FinetuneSettings(batch_size=0, optimizer="sgd", layer_decay=2.0, lr_search=(1e-3, -1.0), seed=2**32)
    with pytest.raises(InputError) as caught:
        check(bad, "head_layer is 99")
    assert str(caught.value).split("; ") == [
        "batch_size is 0, expected more than 0",
        "optimizer is 'sgd', expected one of adamw, muon",
        "seed is 4294967296, expected 0 to 4294967295",
        "layer_decay is 2.0, expected more than 0 and at most 1",
        "lr_search has -1.0, expected more than 0",
        "head_layer is 99",
    ]


def test_what_is_requested_goes_before_what_is_filled_in():
    found = resolved(
        ResolvedPretrain,
        PretrainSettings(batch_size=3, betas=(0.8, 0.9)),
        batch_size=7,
        betas=(0.9, 0.95),
        learning_rate=0.1,
        warmup_steps=2,
        optimizer="adamw",
        weight_decay=0.0,
        mask_prob=0.15,
    )
    assert (found.batch_size, found.betas, found.learning_rate) == (3, (0.8, 0.9), 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_config_json_keeps_every_setting(kind):
    settings = kind(batch_size=3, betas=(0.5, 0.75), steps=8)
    written = json.loads(json.dumps(to_config(settings)))
    assert from_config(kind, written | {"n_parameters": 5}, Path("config.json")) == settings
    with pytest.raises(FormatError, match=r"config\.json: unknown setting colour; known: .*batch_size"):
        from_config(kind, {"colour": 1}, Path("config.json"))


def test_settings_by_name_are_shared_out():
    assert split_settings(TrainSettings, {"tau": 2.0, "keep": 5}) == (TrainSettings(tau=2.0), Execution(keep=5))
    assert not {f.name for f in fields(Execution)} & {f.name for kind in KINDS for f in fields(kind)}


def test_all_tasks_share_their_common_settings():
    for kind in KINDS:
        assert issubclass(kind, LearningSettings)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"task": "train", "finetuned_from": {}}, "train"),
        ({"training": {"recipe": "plain"}, "finetuned_from": {}}, "train"),
        ({"training": {"head_layer": 2}, "finetuned_from": {"path": "runs/a"}}, "finetune"),
        ({"training": {"steps": 2}}, "pretrain"),
        ({"model": {}}, "pretrain"),
    ],
)
def test_the_task_of_a_run_is_stated_or_follows_from_its_keys(config, task):
    assert task_of(config) == task


@pytest.mark.parametrize("task", ["pretrain", "finetune", "train"])
def test_a_run_of_an_earlier_version_is_still_read(task):
    """Files that igpt 0.1.0 wrote before config.json named the task."""
    path = Path(__file__).parents[1] / "golden" / f"config-{task}-0.1.json"
    config = read_json(path, "a config.json")
    assert task_of(config) == task
    kind = TASKS[task].resolved_type
    more = architecture(config["model"]) if task == "pretrain" else {}
    settings = from_config(kind, config["training"] | more, path)
    check(settings)
    written = {k: list(v) if isinstance(v, tuple) else v for k, v in to_config(settings).items()}
    assert written | {"n_parameters": config["training"]["n_parameters"]} == config["training"]
    execution = from_config(Execution, config["execution"], path)
    check(execution)
    assert asdict(execution) == config["execution"]
