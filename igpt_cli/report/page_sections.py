"""The sections of a report, each from what is known of the runs to HTML."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from igpt_cli import __version__
from igpt_cli.palette.describe import describe
from igpt_cli.report.budgets import training_cost
from igpt_cli.report.compare import notes_on
from igpt_cli.report.losses import curve
from igpt_cli.report.page_charts import chart_figure, loss_charts, palette_chart
from igpt_cli.report.page_html import Cell, code, details, listed, number, pairs, picture, table, text, word
from igpt_cli.report.page_layers import layer_cell, layer_chart, probe_groups
from igpt_cli.report.page_run import Account


def glance(accounts: Sequence[Account]) -> str:
    """The table of all runs, and what must be borne in mind when they are compared."""
    header = ["run", "model", "probe %", "95% from", "to", "layer", "own head %", "held-out loss", "nats per"]
    header += ["training", "steps", "images seen", "passes", "seconds", "parameters", "GFLOPs/image"]
    rows: list[list[Cell]] = []
    costs: list[dict[str, Any]] = []
    for account in accounts:
        cost, result = training_cost(account.config), account.config.get("result") or {}
        loss = _held_out(account)
        probe: dict[str, Any] = account.probe or {}
        low, high = probe.get("interval") or (None, None)
        unit = "token" if account.config["model"].get("backend") == "igpt" else "image"
        augment = None if cost["augment"] == "none" else cost["augment"]
        kind = ", ".join(str(v) for v in (cost["kind"], cost["recipe"], augment) if v)
        rows.append(
            [
                Cell(f'<span class="mark s{len(rows) % 8}"></span>{text(account.name)}', account.name),
                word(account.config["model"].get("name")),
                number(probe.get("accuracy"), ".1f"),
                number(low, ".1f"),
                number(high, ".1f"),
                layer_cell(probe["layer"]) if probe else word(None),
                number(result.get("accuracy"), ".1f"),
                number(loss, ".3f"),
                word(unit if loss is not None else None),
                word(f"{kind}, taught by {cost['teacher']}" if cost["teacher"] else kind),
                number(cost["steps"]),
                number(cost["images_seen"]),
                number(cost["epochs"], ",.2f"),
                number(cost["seconds"], ",.0f"),
                number(account.n_parameters),
                number(account.flops / 1e9, ",.2f"),
            ]
        )
        masks = probe.get("bert_masks")
        costs.append({"name": account.name, "bert_masks": masks, "head_note": None, "training": cost})
        costs[-1]["resolution"] = account.config["model"].get("resolution")
    notes = notes_on(costs) if len(accounts) > 1 else []
    for account in accounts:
        if seeds := (account.probe or {}).get("seeds"):
            probe = account.probe or {}
            notes.append(
                f"{account.name} was probed with {len(seeds)} seeds: {probe['accuracy_mean']:.1f}% on average, "
                f"deviation {probe['accuracy_deviation']:.1f}; the table has the first"
            )
    if len(probe_groups(accounts)) > 1:
        notes.insert(0, "the probes are of different images or protocols, so their accuracies cannot be compared")
    filled = [i for i in range(len(header)) if i == 0 or any(row[i].key is not None for row in rows)]
    shown = table(
        "comparison",
        "The runs; a heading sorts by its column",
        [header[i] for i in filled],
        [[row[i] for i in filled] for row in rows],
        sortable=True,
    )
    how = (
        "Probe: test accuracy of a linear classifier on the features of the layer that held-out images chose, with its "
        "95% interval. Own head: accuracy of the model's own class head on its test images. FLOPs are of one image "
        "going forward, a multiply-add counting two."
    )
    gaps = [f"{account.name}: {note}" for account in accounts for note in account.notes]
    return shown + f'<p class="small">{how}</p>' + _notes("To bear in mind", notes) + _notes("Not on this page", gaps)


def _held_out(account: Account) -> float | None:
    """The loss that the run ended with, or while it goes on the last that it recorded."""
    if (loss := (account.config.get("result") or {}).get("val_loss")) is not None:
        return loss
    recorded = curve(account, "val_loss")
    return recorded[-1][1] if recorded else None


def _notes(title: str, notes: Sequence[str]) -> str:
    return f'<div class="note"><h3>{text(title)}</h3>{listed(notes)}</div>' if notes else ""


def trained(accounts: Sequence[Account]) -> str:
    """A part for each run: in sentences what it is and learnt from what, then every setting."""
    return "\n".join(_trained(i, account) for i, account in enumerate(accounts))


def _trained(i: int, account: Account) -> str:
    config, model = account.config, account.config["model"]
    parts = {name: config.get(name) or {} for name in ("training", "data", "machine", "result", "execution")}
    said = pairs(
        [
            ("model", text(_model(account))),
            ("data", text(_data(account))),
            ("training", text(_training(account))),
            ("machine", text(_machine(parts["machine"]))),
            ("outcome", text(_outcome(account))),
        ]
    )
    settings = [("model", model), *parts.items()]
    settings += [(k, config[k]) for k in ("preparation", "imported", "finetuned_from", "teacher") if config.get(k)]
    rows = [
        [word(f"{part}.{key}"), word(_value(value))]
        for part, values in settings
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    every = details("Every setting", table(f"settings-{i}", "config.json", ["setting", "value"], rows))
    return (
        f'<section class="run"><h3><span class="mark s{i % 8}"></span>{text(account.name)}</h3>{said}{every}</section>'
    )


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
    side = model.get("resolution")
    if model.get("backend") != "igpt":
        shape = f"{model.get('name')}, a {model.get('backend')} of RGB images of {side}x{side} pixels"
        classes = model.get("n_classes")
        return f"{shape}; {account.n_parameters:,} parameters" + (f"; tells {classes:,} classes" if classes else "")
    objective = {"bert": "masked pixels"}.get(model.get("objective"), "the next pixel")
    heads = model.get("n_head")
    return (
        f"{model.get('name')}, {model.get('n_layer')} layers of width {model.get('n_embd')}, "
        f"{heads} head{'' if heads == 1 else 's'}; {account.n_parameters:,} parameters; {side}x{side} pixels in "
        f"{model.get('n_vocab'):,} colours; predicts {objective}"
        + (f"; tells {model['n_classes']:,} classes" if model.get("n_classes") else "")
    )


def _data(account: Account) -> str:
    data, imported = account.config.get("data") or {}, account.config.get("imported") or {}
    if not data:
        return f"imported from {imported['from']}" if imported.get("from") else "not recorded"
    counts = [f"{data[k]:,} {what}" for k, what in _SPLITS if isinstance(data.get(k), int)]
    classes = data.get("classes")
    named = f"; classes: {_value(classes)}" if classes else ""
    return f"{data.get('source') or 'images not named'} as {data.get('path')}: {', '.join(counts)} images{named}"


_SPLITS = (("n_train", "training"), ("n_val", "held-out"), ("n_test", "test"))


def _training(account: Account) -> str:
    training = account.config.get("training") or {}
    if not training:
        return ""
    cost = training_cost(account.config)
    rate, size = training.get("learning_rate"), training.get("batch_size")
    parts = [
        cost["kind"] + (f" by the recipe {cost['recipe']}" if cost["recipe"] else ""),
        f"of {cost['start']}" if cost["start"] else "",
        f"{cost['steps']:,} steps" if cost["steps"] else "",
        f"{size:,} images a step" if size else "",
        f"{cost['images_seen']:,} images seen ({cost['epochs']:.3g} passes)"
        if cost["images_seen"] and cost["epochs"]
        else "",
        f"{training.get('optimizer')}, learning rate {rate:g}" if isinstance(rate, (int, float)) else "",
        f"augmentation {cost['augment']}" if cost["augment"] else "",
        f"taught by {cost['teacher']}" if cost["teacher"] else "",
        f"seed {training.get('seed')}",
    ]
    return ", ".join(part for part in parts if part)


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    ranks = f", {machine['ranks']} ranks" if (machine.get("ranks") or 1) > 1 else ""
    return f"{machine.get('device_name') or machine.get('device')}{ranks}, {machine.get('precision')}"


def _outcome(account: Account) -> str:
    result = account.config.get("result") or {}
    parts = [f"status {result.get('status', 'not known')}"]
    if result.get("status") == "running" and (steps := curve(account, "loss")):
        parts.append(f"{steps[-1][0]:,.0f} steps recorded")
    if (seconds := result.get("seconds")) is not None:
        parts.append(f"{seconds:,.0f} s")
    parts += [
        f"{what} {result[key]:.3f} nats"
        for key, what in (("train_loss", "training loss"), ("val_loss", "held-out loss"))
        if isinstance(result.get(key), (int, float))
    ]
    if result.get("accuracy") is not None:
        low, high = result["interval"]
        parts.append(
            f"accuracy {result['accuracy']:.1f}% of {result.get('n_test') or 0:,} test images (95%: {low:.1f} to "
            f"{high:.1f})"
        )
    return ", ".join(parts)


def palettes(accounts: Sequence[Account]) -> str:
    """Each palette once, with the runs that have it."""
    groups: dict[str, list[Account]] = {}
    for account in accounts:
        if account.palette is not None:
            groups.setdefault(account.palette.sha256, []).append(account)
    if not groups:
        return "<p>None of these models has a palette.</p>"
    out = []
    for sha256, group in groups.items():
        palette = group[0].palette
        assert palette is not None
        told = describe(palette)
        meta = palette.meta
        known = told["pixels"] is not None
        images = f" of {told['images']:,} images" if isinstance(told["images"], int) else ""
        facts = [
            ("used by", text(", ".join(a.name for a in group))),
            ("colours", f"{palette.n_vocab:,}, by {text(told['order'])}"),
            ("fitted on", f"{told['pixels']:,} pixels{images}" if known else "not known"),
            ("seed", text(meta["seed"]) if "seed" in meta else ""),
            ("PSNR", f"{told['psnr']:.1f} dB" if told["psnr"] else ""),
            ("commonest", _commonest(told["colours"]) if known else ""),
            ("hardly used", f"{len(told['dead'] + told['rare']):,} of them" if known else ""),
            ("SHA-256", f"<code>{sha256}</code>"),
        ]
        caption = "Every colour by its number, row after row" + (
            "; below, each as wide as its share of the pixels." if known else "; its use is not known."
        )
        title = f"<h3>{text(', '.join(a.name for a in group))}</h3>" if len(groups) > 1 else ""
        out.append(title + chart_figure(palette_chart(palette), caption) + pairs(facts))
    return "\n".join(out)


def _commonest(colours: Sequence[dict[str, Any]]) -> str:
    most = sorted(colours, key=lambda c: -c["count"])[:5]
    return ", ".join(f"{c['hex']} {c['share']:.1f}%" for c in most)


def pictures(accounts: Sequence[Account]) -> str:
    """Samples and completions of every model that draws."""
    out = []
    for account in accounts:
        if account.pictures:
            shown = "".join(picture(p.png, p.size, p.alt, p.caption) for p in account.pictures)
            out.append(f'<h3>{text(account.name)}</h3><div class="pictures">{shown}</div>')
    return "\n".join(out)


def losses(accounts: Sequence[Account]) -> str:
    """The curves of training."""
    return "\n".join(loss_charts(accounts))


def layers(accounts: Sequence[Account]) -> str:
    """The probes of every layer, with few labels where they were tried; a chart for those that can be compared."""
    out = []
    for k, group in enumerate(probe_groups(accounts)):
        out.append(layer_chart(group, f"layers-{k}"))
        rows = [
            [
                word(account.name),
                number(row["labels_per_class"]),
                number(row["accuracy"], ".1f"),
                number(row.get("deviation"), ".1f"),
            ]
            for _, account in group
            for row in (account.probe or {}).get("few_labels") or []
        ]
        if rows:
            header = ["run", "labels of each class", "test %", "deviation"]
            out.append(table(f"few-{k}", "With few labels: mean and deviation over random subsets", header, rows, True))
    return "\n".join(out)


def commands(accounts: Sequence[Account], command: str | None) -> str:
    """What was typed to make the runs, and what makes the pictures and probes of this page."""
    out = []
    for account in accounts:
        typed = account.config.get("command")
        out.append(f"<h3>{text(account.name)}</h3>")
        out.append(code(typed) if typed else "<p>The command that made it was not recorded.</p>")
        out += [code(shlex.join(["igpt", *picture.command])) for picture in account.pictures]
        if account.probed_here and (probe := account.probe):
            limits = ["--train-images", str(probe["n_train"]), "--test-images", str(probe["n_test"])]
            words = ["igpt", "probe", account.run, str(probe["tokens"]), *limits, "--seed", str(probe["seed"])]
            out.append(code(shlex.join([*words, "--details", "-o", "probe.json"])))
    return "\n".join(out) + (f"<h3>This page</h3>{code(command)}" if command else "")


def hashes(accounts: Sequence[Account], created: str) -> str:
    """Versions, and SHA-256 of what the runs were made of."""
    out = []
    for account in accounts:
        config = account.config
        data, versions = config.get("data") or {}, config.get("versions") or {}
        palette = account.palette.sha256 if account.palette else data.get("palette_sha256")
        sums = [
            ("model.safetensors", account.weights_sha256),
            ("training tokens", data.get("tokens_sha256")),
            ("labels", data.get("labels_sha256")),
            ("palette", palette),
        ]
        facts = [("made", text(config.get("created") or "")), ("with", text(_value(versions)))]
        facts += [(name, f"<code>{text(value)}</code>") for name, value in sums if value]
        out.append(f"<h3>{text(account.name)}</h3>{pairs(facts)}")
    return (
        "\n".join(out) + f'<p class="small">Hashes are SHA-256. Page made by igpt {text(__version__)}, {created}.</p>'
    )
