"""Sections of a report, for templates/page.html."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from igpt_cli.palette.describe import describe
from igpt_cli.report.budgets import training_cost
from igpt_cli.report.compare import Noted, notes_on
from igpt_cli.report.html import Table
from igpt_cli.report.losses import curve
from igpt_cli.report.page_charts import Plot, accuracy_plot, loss_plots, swatches
from igpt_cli.report.page_layers import layer_plot, probe_groups
from igpt_cli.report.page_run import Account

#: Columns of the table of all runs.
GLANCE = (
    "run|model|probe %:.1f|95% from:.1f|to:.1f|layer:layer|own head %:.1f|held-out loss:.3f|nats per|training|steps:,|"
    "images seen:,|passes:,.2f|seconds:,.0f|parameters:,|GFLOPs/image:,.2f"
)
#: Up to so many classes a confusion matrix is shown; of more, only the pairs most often confused, so many of them.
MANY_CLASSES, CONFUSED = 25, 12
Facts = list[tuple[str, Any]]


def glance(accounts: Sequence[Account]) -> dict[str, Any]:
    """The table of all runs, notes on comparing them, and what is missing from the page."""
    rows, costs, seeds = [], [], []
    for account in accounts:
        model, result = account.config["model"], account.config.get("result") or {}
        cost, loss = training_cost(account.config), _held_out(account)
        probe: dict[str, Any] = account.probe or {}
        augment = None if cost.augment == "none" else cost.augment
        training = _listed([cost.kind, cost.recipe, augment, cost.teacher and f"taught by {cost.teacher}"])
        unit = "token" if model.get("backend") == "igpt" else "image"
        rows.append(
            [
                *(account.name, model.get("name"), probe.get("accuracy"), *(probe.get("interval") or (None, None))),
                *(probe.get("layer"), result.get("accuracy"), loss, None if loss is None else unit, training),
                *(cost.steps, cost.images_seen, cost.epochs, cost.seconds),
                *(account.n_parameters, account.flops / 1e9),
            ]
        )
        costs.append(Noted(account.name, cost, model.get("resolution"), probe.get("bert_masks")))
        if n := len(probe.get("seeds") or ()):
            seeds.append(
                f"{account.name} was probed with {n} seeds: {probe['accuracy_mean']:.1f}% on average, "
                f"standard deviation {probe['accuracy_deviation']:.1f}; the table has the first"
            )
    notes = [*(notes_on(costs) if len(accounts) > 1 else []), *seeds]
    if len(probe_groups(accounts)) > 1:
        notes.insert(0, "the probes are of different images or protocols, so their accuracies cannot be compared")
    columns = GLANCE.split("|")
    filled = [i for i in range(len(columns)) if i == 0 or any(row[i] is not None for row in rows)]
    header, rows = "|".join(columns[i] for i in filled), [[row[i] for i in filled] for row in rows]
    return {
        "table": Table("comparison", "The runs; a heading sorts by its column", header, rows, marked=True),
        "notes": notes,
        "gaps": [f"{account.name}: {note}" for account in accounts for note in account.notes],
    }


def _held_out(account: Account) -> float | None:
    """The loss that the run ended with, or while it runs the last that it recorded."""
    if (loss := (account.config.get("result") or {}).get("val_loss")) is not None:
        return loss
    recorded = curve(account, "val_loss")
    return recorded[-1][1] if recorded else None


def _listed(parts: Iterable[Any]) -> str:
    """The parts that are there, as a list in words."""
    return ", ".join(str(part) for part in parts if part)


def trained(accounts: Sequence[Account]) -> list[tuple[str, Facts, Table]]:
    """Of each run its name, in words what it is and learnt from what, and every setting."""
    return [_trained(i, account) for i, account in enumerate(accounts)]


#: Where the data lay, of use to the one who resumes a run alone ("absolute" in runs before from_run).
PLACES = ("data.from_run", "data.absolute")


def _trained(i: int, account: Account) -> tuple[str, Facts, Table]:
    config = account.config
    parts = ["model", "training", "data", "machine", "result", "execution"]
    parts += ["preparation", "imported", "finetuned_from", "teacher"]
    facts: Facts = [
        ("model", _model(account)),
        ("data", _data(config.get("data") or {}, config.get("imported") or {})),
        ("training", _training(config)),
        ("machine", _machine(config.get("machine") or {})),
        ("outcome", _outcome(account)),
    ]
    settings = [
        (f"{part}.{key}", _value(value))
        for part in parts
        if isinstance(values := config.get(part), dict)
        for key, value in values.items()
        if f"{part}.{key}" not in PLACES
    ]
    table = Table(f"settings-{i}", "config.json", "setting|value", settings, sortable=False)
    return account.name, facts, table


def _value(value: Any) -> str:
    """A setting in words; of long lists the beginning.

    >>> _value([True, 0, None]), _value({"a": 1.5})
    ('yes, 0, not set', 'a: 1.5')
    """
    if isinstance(value, list) and len(value) > 24:
        return f"{_value(value[:24])} and {len(value) - 24:,} more"
    if isinstance(value, list):
        return ", ".join(_value(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _model(account: Account) -> str:
    model = account.config["model"]
    name, size = model.get("name"), f"{model.get('resolution')}x{model.get('resolution')} pixels"
    heads = f"{model.get('n_head')} head{'' if model.get('n_head') == 1 else 's'}"
    parameters, classes = f"{account.n_parameters:,} parameters", ""
    if model.get("n_classes"):
        classes = f"; classifies {model['n_classes']:,} classes"
    if model.get("backend") != "igpt":
        return f"{name}, a {model.get('backend')} of RGB images of {size}; {parameters}{classes}"
    predicts = "masked pixels" if model.get("objective") == "bert" else "the next pixel"
    return (
        f"{name}, {model.get('n_layer')} layers of width {model.get('n_embd')}, {heads}; {parameters}; {size} in "
        f"{model.get('n_vocab'):,} colours; predicts {predicts}{classes}"
    )


def _data(data: dict[str, Any], imported: dict[str, Any]) -> str:
    if not data:
        return f"imported from {imported['from']}" if imported.get("from") else "not recorded"
    splits = (("n_train", "training"), ("n_val", "held-out"), ("n_test", "test"))
    counts = _listed(f"{data[k]:,} {what}" for k, what in splits if isinstance(data.get(k), int))
    classes = f"; classes: {_value(data['classes'])}" if data.get("classes") else ""
    return f"{data.get('source') or 'images not named'} as {data.get('path')}: {counts} images{classes}"


def _training(config: dict[str, Any]) -> str:
    training, cost = config.get("training") or {}, training_cost(config)
    if not training:
        return ""
    rate, size, seen = training.get("learning_rate"), training.get("batch_size"), cost.images_seen
    return _listed(
        [
            cost.kind + (f" by the recipe {cost.recipe}" if cost.recipe else ""),
            cost.start and f"of {cost.start}",
            cost.steps and f"{cost.steps:,} steps",
            size and f"{size:,} images a step",
            seen and cost.epochs and f"{seen:,} images seen ({cost.epochs:.3g} passes)",
            isinstance(rate, (int, float)) and f"{training.get('optimizer')}, learning rate {rate:g}",
            cost.augment and f"augmentation {cost.augment}",
            cost.teacher and f"taught by {cost.teacher}",
            f"seed {training.get('seed')}",
        ]
    )


def _machine(machine: dict[str, Any]) -> str:
    ranks = machine.get("ranks") or 1
    device = machine.get("device_name") or machine.get("device")
    return _listed([device, ranks > 1 and f"{ranks} ranks", machine.get("precision")]) if machine else ""


def _outcome(account: Account) -> str:
    result = account.config.get("result") or {}
    status, seconds, accuracy = result.get("status", "not known"), result.get("seconds"), result.get("accuracy")
    parts = [f"status {status}"]
    if status == "running" and (steps := curve(account, "loss")):
        parts.append(f"{steps[-1][0]:,.0f} steps recorded")
    if seconds is not None:
        parts.append(f"{seconds:,.0f} s")
    for what, loss in (("training", result.get("train_loss")), ("held-out", result.get("val_loss"))):
        if isinstance(loss, (int, float)):
            parts.append(f"{what} loss {loss:.3f} nats")
    if accuracy is not None:
        (low, high), n = result["interval"], result.get("n_test") or 0
        parts.append(f"accuracy {accuracy:.1f}% of {n:,} test images (95%: {low:.1f} to {high:.1f})")
    return ", ".join(parts)


def palettes(accounts: Sequence[Account]) -> list[tuple[dict[str, Any], Facts, str]]:
    """Each palette once: how it is drawn, what is known of it, its hash."""
    found = {account.palette.sha256: account.palette for account in accounts if account.palette is not None}
    out = []
    for sha256, palette in found.items():
        about, images = describe(palette), ""
        if isinstance(about["images"], int):
            images = f" of {about['images']:,} images"
        users = [a.name for a in accounts if a.palette is not None and a.palette.sha256 == sha256]
        facts: Facts = [
            ("used by", ", ".join(users)),
            ("colours", f"{palette.n_vocab:,}, by {about['order']}"),
            ("fitted on", "not known" if about["pixels"] is None else f"{about['pixels']:,} pixels{images}"),
            ("seed", str(palette.meta.get("seed", ""))),
            ("PSNR", about["psnr"] and f"{about['psnr']:.1f} dB"),
        ]
        if about["pixels"] is not None:
            most = sorted(about["colours"], key=lambda c: -c["count"])[:5]
            facts.append(("commonest", ", ".join(f"{c['hex']} {c['share']:.1f}%" for c in most)))
            facts.append(("hardly used", f"{len(about['dead'] + about['rare']):,} of them"))
        out.append((swatches(about), facts, sha256))
    return out


def losses(accounts: Sequence[Account]) -> list[Plot]:
    """The curves of training, and of class heads."""
    return [*loss_plots(accounts), *accuracy_plot(accounts)]


def layers(accounts: Sequence[Account]) -> list[tuple[Plot, Table]]:
    """The probes of every layer, a chart for those that can be compared, and with few labels where they were tried."""
    out = []
    for k, group in enumerate(probe_groups(accounts)):
        rows = [
            (run, row["labels_per_class"], row["accuracy"], row.get("deviation"))
            for _, run, probe in group
            for row in probe.get("few_labels") or []
        ]
        header = "run|labels of each class:,|test %:.1f|std:.1f"
        few = Table(f"few-{k}", "With few labels: mean and standard deviation over random subsets", header, rows)
        out.append((layer_plot(group, f"layers-{k}"), few))
    return out


def confusion(accounts: Sequence[Account]) -> list[tuple[str, dict[str, Any] | None, Table]]:
    """Which classes each probe takes for which: percentages of each true class, and the pairs most often confused."""
    out = []
    for i, account in enumerate(accounts):
        probe: dict[str, Any] = account.probe or {}
        details = probe.get("details") or {}
        if not (counts := details.get("confusion")):
            continue
        names = [details["classes"][k] if k < len(details["classes"]) else str(k) for k in range(len(counts))]
        matrix = {
            "id": f"confusion-{i}",
            "caption": f"Test images of each true class (rows) by predicted class (columns), in percent: probe of "
            f"layer {probe['layer']}, {probe['accuracy']:.1f}% of {probe['n_test']:,} right",
            "classes": names,
            "rows": [(name, [100 * n / max(1, sum(r)) for n in r], sum(r)) for name, r in zip(names, counts)],
        }
        mistakes = [(n, a, b) for a, row in enumerate(counts) for b, n in enumerate(row) if n and a != b]
        rows = [
            (names[a], names[b], n, 100 * n / sum(counts[a]))
            for n, a, b in sorted(mistakes, key=lambda m: (-m[0], m[1:]))[:CONFUSED]
        ]
        table = Table(f"confused-{i}", "Most often confused", "true class|taken for|images:,|% of the class:.0f", rows)
        out.append((account.name, matrix if len(names) <= MANY_CLASSES else None, table))
    return out


def commands(accounts: Sequence[Account], command: str | None) -> dict[str, Any]:
    """What was typed to make the runs, what makes the pictures and probes of this page, and the page."""
    runs = []
    for account in accounts:
        lines = [["igpt", *picture.command] for picture in account.pictures]
        if account.probed_here and (probe := account.probe):
            limits = ["--train-images", str(probe["n_train"]), "--test-images", str(probe["n_test"])]
            words = ["igpt", "probe", account.run, str(probe["tokens"]), *limits, "--seed", str(probe["seed"])]
            lines.append([*words, "--details", "-o", "probe.json"])
        runs.append((account.name, account.config.get("command"), [shlex.join(line) for line in lines]))
    return {"runs": runs, "page": command}


def hashes(accounts: Sequence[Account]) -> list[tuple[str, Facts, Facts]]:
    """Versions, and SHA-256 of what the runs were made of."""
    out = []
    for account in accounts:
        config, data = account.config, account.config.get("data") or {}
        facts: Facts = [("made", config.get("created")), ("with", _value(config.get("versions") or {}))]
        sums = [
            ("model.safetensors", account.weights_sha256),
            ("training tokens", data.get("tokens_sha256")),
            ("labels", data.get("labels_sha256")),
            ("palette", account.palette.sha256 if account.palette else data.get("palette_sha256")),
        ]
        out.append((account.name, facts, sums))
    return out
