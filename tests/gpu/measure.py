"""Everything here that wants a GPU, in one command that ends within ten minutes:

    IGPT_CIFAR10=cifar10-jpeg.tar.gz python3 tests/gpu/measure.py OUT

It runs from the source tree, without installation, in stages. Each gets its share of the time that is left, and each of
its steps is an igpt command in a process of its own, so that what fails or is cut short loses nothing else:

    tests   the tests marked gpu
    bench   igpt-s, igpt-m and igpt-l against transformers, then variants while time is left
    train   minGPT's setting (12 layers, width 256, 8 heads) on CIFAR-10: curves, loss on the test split
    tiny    the model that ships with igpt, trained anew: OUT/igpt-tiny.tar.gz
    sample  samples and completions by the model of `train`: OUT/pictures.tar.gz; drawing against transformers
    probe   the solvers of a probe; of the model of `train`: accuracy by layer beside floors, with few labels, fine-tuned
            and from scratch; the same of a BERT model while time is left
    compare only when named: every other kind of model trained on CIFAR-10's labels, each for the same time, and `igpt
            compare` of them and the model of `train`: OUT/compared

Results are in OUT/summary.json and OUT/summary.md, rewritten after every step, with curves, the runs' records and
log.txt beside them; large files (tokens, checkpoints) are in --work. A second call adds to the first:

    python3 tests/gpu/measure.py OUT --stages train --train-minutes 18            the first half of a longer run
    python3 tests/gpu/measure.py OUT --stages train --resume                      the second
    python3 tests/gpu/measure.py OUT --toy                                        all of it on a CPU, in toy sizes
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Stages with their shares of the time.
SHARES = {"tests": 2, "bench": 6, "train": 5, "tiny": 2, "sample": 4, "probe": 6, "compare": 12}
#: Those that are run unless some are named.
DEFAULT = tuple(stage for stage in SHARES if stage != "compare")
#: With less time than this, in seconds, a stage is left out.
LEAST = 30
#: Seconds beside the training itself: before it, to start and to compile; after it, to validate, draw and evaluate.
BEFORE_TRAINING, AFTER_TRAINING = 40, 60
#: Seconds for one measurement at most.
BENCH_LIMIT = 180

MODELS = (
    "igpt-s --against transformers",
    "igpt-m --against transformers",
    "igpt-l --against transformers -b 64 --warmup 1",
)
VARIANTS = (
    "igpt-s --attention cudnn",
    "igpt-m --attention cudnn",
    "igpt-l --attention cudnn",
    "igpt-s --micro-batch 128",
    "igpt-s --micro-batch 64",
    "igpt-s --micro-batch 32",
    "igpt-s --no-compile",
    "igpt-l --recompute --micro-batch 32",
    "igpt-s --optimizer muon",
    "igpt-xs --n-layer 12 -b 64",
    "igpt-s --against transformers-compiled",
    "igpt-m --no-compile",
    "igpt-m --resolution 48 -b 64",
)
# transformers takes about 10 ms a step of igpt-s, 20 of igpt-l, and there are two drawings: whole images of igpt-s alone.
DRAWN = (
    "igpt-s --precision bfloat16 --against transformers --repeats 1",
    "igpt-m --precision bfloat16 --against transformers --repeats 1 --pixels 256",
    "igpt-l --precision bfloat16 --against transformers --repeats 1 --pixels 256",
    "igpt-s --against transformers --repeats 1 --pixels 256",
    "igpt-s -b 64 --precision bfloat16",
    "igpt-tiny --precision bfloat16",
    "igpt-l --precision bfloat16 --repeats 1",
)
# minGPT's sizes. Half its batch of 128 images gives a run of minutes twice the updates, and its 65,536 tokens still fill
# a GPU at this width; its learning rate; a clipped gradient, as nobody watches. Flipped images look like images, so
# that ten million parameters over-fit later.
TRAIN = "-m igpt-xs --n-layer 12 -b 64 --lr 0.003 --clip 1 --augment flip"
TINY = "-m igpt-tiny -b 64 --val-images 1000"
# A teacher comes before its student.
COMPARED = (
    "resnet-18-32",
    "vit-s-32",
    "deit-ti-distilled-32 --teacher resnet-18-32",
    "swin-t-32",
    "sasa-26-32",
    "attention-conv",
)
#: Seconds of a comparison beside the training: to start and compile each model, and to probe them all.
BEFORE_EACH, PROBING = 30, 150

TOY_MODELS = ("igpt-tiny --against transformers", "igpt-tiny -b 2", "igpt-none")
TOY_SIZES = "-r 8 --n-layer 2 --n-embd 16 --steps 1 --repeats 2 --warmup 0"
TOY_DRAWN = ("igpt-tiny --against transformers", "igpt-tiny --pixels 5")
TOY_DRAWING = "-r 8 --n-layer 2 --n-embd 16 -b 2 --repeats 1"
TOY_TRAIN = "-m igpt-tiny --n-layer 2 --n-embd 16 -b 8"
TOY_COMPARED = ("resnet-18-32", "deit-ti-distilled-32 --teacher resnet-18-32")
TOY_SOLVERS = "--problems 2 --rows 40 --width 4"
TOY_FEATURES = "-r 8 --n-layer 2 --n-embd 16 --repeats 1 -b 2"


class Measurement:
    """What was found, where it is kept, and how much time is left."""

    def __init__(self, out: Path, work: Path, seconds: float, toy: bool, train_seconds: float | None, train: str):
        self.out, self.work, self.toy, self.train_seconds, self.train = out, work, toy, train_seconds, train
        self.end = time.monotonic() + seconds
        self.stage_end = self.end
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        file = out / "summary.json"
        self.found: dict = json.loads(file.read_text()) if file.exists() else {}
        self.found.setdefault("steps", [])

    def left(self) -> float:
        """Seconds until the stage must end."""
        return self.stage_end - time.monotonic()

    def save(self) -> None:
        """Write the summaries; the old ones stay until the new ones are whole."""
        for name, text in (("summary.json", json.dumps(self.found, indent=2) + "\n"), ("summary.md", page(self.found))):
            part = self.out / f".{name}.part"
            part.write_text(text)
            part.replace(self.out / name)

    def run(self, *command: str, limit: float | None = None, cwd: Path | None = None, any_code: bool = False):
        """What a command prints; None if it failed, unless `any_code`. At its limit it is asked to end, then made to."""
        limit = min(limit or 1e9, self.left())
        shown = shlex.join(command).replace(sys.executable, "python3")
        print(f"$ {shown}", flush=True)
        started = time.monotonic()
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"\n$ {shown}\n")
            log.flush()
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(
                command, cwd=cwd or self.work, env=environment, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
            try:
                text, cut = process.communicate(timeout=max(1.0, limit))[0], False
            except subprocess.TimeoutExpired:
                text, cut = end(process), True
            except BaseException:
                end(process)
                raise
            log.write(text)
        seconds = round(time.monotonic() - started, 1)
        step = {"command": shown, "seconds": seconds, "code": process.returncode, "cut": cut}
        self.found["steps"].append(step)
        print(f"  {seconds} s, exit {process.returncode}{', out of time' if cut else ''}", flush=True)
        self.save()
        return text if any_code or process.returncode == 0 else None

    def igpt(self, *arguments: str, limit: float | None = None) -> str | None:
        return self.run(sys.executable, "-m", "igpt_cli", *arguments, limit=limit)

    def json(self, *arguments: str, limit: float | None = None) -> dict | None:
        """The document that an igpt command with --json prints."""
        text = self.igpt(*arguments, "--json", limit=limit)
        return json.loads(text) if text else None


def end(process: subprocess.Popen) -> str:
    """End a process with its children; what it had printed."""
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            return process.communicate(timeout=patience)[0]
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return process.communicate()[0]
    return ""


# The stages.


def tests(m: Measurement) -> None:
    text = m.run(sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "tests/gpu", cwd=ROOT, any_code=True)
    m.found["tests"] = text.strip()[-4000:]


def bench(m: Measurement) -> None:
    measure_lines(m, "bench", "train", TOY_MODELS if m.toy else MODELS + VARIANTS)


def sample(m: Measurement) -> None:
    """The pictures first, which take seconds."""
    run, tokens, pictures = m.work / "cifar10-mingpt", m.work / "cifar10.h5", m.work / "pictures"
    if (run / "config.json").exists():
        shutil.rmtree(pictures, ignore_errors=True)
        n = "4" if m.toy else "64"
        m.igpt("sample", str(run), "-n", n, "-o", f"{pictures}/samples.png", "--gif", f"{pictures}/samples.gif")
        m.igpt("sample", str(run), "-n", "8", "--nearest", str(tokens), "-o", f"{pictures}/nearest.png")
        m.igpt("complete", str(run), str(tokens), "--keep", "0.5", "--limit", "12", "-o", f"{pictures}/completions.png")
        m.found["pictures"] = sorted(p.name for p in pictures.glob("*"))
        with tarfile.open(m.out / "pictures.tar.gz", "w:gz") as archive:
            for name in m.found["pictures"]:
                archive.add(pictures / name, f"pictures/{name}")
    measure_lines(m, "sample", "sample", TOY_DRAWN if m.toy else DRAWN)


def measure_lines(m: Measurement, key: str, command: str, wanted: tuple[str, ...]) -> None:
    """`igpt bench COMMAND` with the arguments of each line, while time is left; rows go to found[key]."""
    rows: list = m.found.setdefault(key, [])
    for line in wanted:
        if any(row["line"] == line and not row.get("failed") for row in rows) or m.left() < LEAST:
            continue
        rows[:] = [row for row in rows if row["line"] != line]  # what failed is tried again
        quick = {"train": TOY_SIZES, "sample": TOY_DRAWING}[command] if m.toy else ""
        if not m.toy and line in VARIANTS:
            quick = "--repeats 3"
        document = m.json("bench", command, *line.split(), *quick.split(), limit=BENCH_LIMIT)
        for row in document["rows"] if document else [{"failed": "see log.txt"}]:
            rows.append({"line": line, **row})
        m.save()


def train(m: Measurement) -> None:
    tokens, run = m.work / "cifar10.h5", m.work / "cifar10-mingpt"
    if not prepare(m, tokens, os.environ.get("IGPT_CIFAR10")):
        m.found["train"] = {"failed": "no tokens: IGPT_CIFAR10 must name the archive of CIFAR-10"}
        return
    seconds = 6 if m.toy else max(10, m.left() - AFTER_TRAINING)
    limit = ["--time-limit", f"{seconds:.0f}s", "--save-every", "60s"]
    if run.exists():
        m.igpt("pretrain", str(tokens), "--resume", str(run), *limit)
    else:  # the schedule is fitted to the budget
        budget = f"{m.train_seconds or max(5, seconds - BEFORE_TRAINING):.0f}s"
        recipe = [*m.train.split(), "--budget", budget, *(["--val-images", "16"] if m.toy else [])]
        m.igpt("pretrain", str(tokens), *recipe, "-o", str(run), *limit)
    m.found["train"] = described(run)
    m.save()
    keep(m, run, "cifar10-run", ("config.json", "metrics.jsonl"))
    few = ["--limit", "16"] if m.toy else []
    best = run / "checkpoints" / "best"
    at = {"last": run, "best": run / "checkpoints" / best.read_text().strip()} if best.exists() else {"last": run}
    for name, weights in at.items():
        if tested := m.json("evaluate", str(weights), str(tokens), "--split", "test", *few):
            keys = ("nats_per_token", "standard_error", "n_images", "bigram", "unigram", "uniform", "seconds")
            m.found["train"][f"test, {name}"] = {k: tested.get(k) for k in keys}


def tiny(m: Measurement) -> None:
    """On a GPU all 25 layers of the small model cost little, so a minute is many times what made the present one."""
    tokens, run = m.work / "embedded.h5", m.work / "igpt-tiny"
    if not prepare(m, tokens, None):
        return
    if run.exists():
        shutil.rmtree(run)
    budget = 5 if m.toy else max(5, m.left() - BEFORE_TRAINING - AFTER_TRAINING)
    recipe = f"{TOY_TRAIN} --val-images 16" if m.toy else TINY
    m.igpt("pretrain", str(tokens), *recipe.split(), "--budget", f"{budget:.0f}s", "-o", str(run))
    m.found["tiny"] = described(run)
    keep(m, run, "igpt-tiny", ("config.json", "metrics.jsonl", "palette.npz", "model.safetensors"))
    if not m.toy:
        for name, which in (("test", str(run)), ("test of the present one", "builtin:igpt-tiny")):
            tested = m.json("evaluate", which, "embedded", "--split", "test")
            m.found["tiny"][name] = tested and tested["nats_per_token"]


def probe(m: Measurement) -> None:
    """What takes seconds first; then fine-tuning; then a BERT model, if there is time to train one."""
    run, tokens, found = m.work / "cifar10-mingpt", m.work / "cifar10.h5", m.found.setdefault("probe", {})
    if "solvers" not in found:
        sizes = TOY_SOLVERS.split() if m.toy else []
        timed = m.json("bench", "probe", "--only", "solvers", *sizes, limit=BENCH_LIMIT)
        found["solvers"] = timed and timed["solvers"]
    if "features" not in found:
        what = f"igpt-tiny {TOY_FEATURES}" if m.toy else "igpt-s --precision bfloat16 --repeats 3"
        timed = m.json("bench", "probe", "--only", "features", *what.split(), limit=BENCH_LIMIT)
        found["features"] = timed and timed["rows"]
    m.save()
    if not (run / "config.json").exists():
        return
    found["ar"] = probed(m, run, tokens, "cifar10-layers")
    m.save()
    for name, more in (("fine-tuned", []), ("from scratch", ["--from-scratch"])):
        if m.left() < LEAST:
            return
        found[name] = tuned(m, run, tokens, m.work / f"cifar10-{name.replace(' ', '-')}", more)
        m.save()
    if m.left() < (5 if m.toy else 2 * LEAST + BEFORE_TRAINING + AFTER_TRAINING):
        return
    bert, budget = m.work / "cifar10-bert", 3 if m.toy else m.left() - BEFORE_TRAINING - AFTER_TRAINING - LEAST
    recipe = [*m.train.split(), "--objective", "bert", *(["--val-images", "16"] if m.toy else [])]
    shutil.rmtree(bert, ignore_errors=True)
    m.igpt("pretrain", str(tokens), *recipe, "--budget", f"{budget:.0f}s", "-o", str(bert))
    if (bert / "config.json").exists():
        found["bert"] = probed(m, bert, tokens, "cifar10-bert-layers")


def probed(m: Measurement, run: Path, tokens: Path, name: str) -> dict | None:
    """All layers with floors and neighbouring layers, then with few labels of the same features; documents are kept."""
    part = ["--train-images", "60", "--test-images", "40"] if m.toy else ["--precision", "bfloat16"]
    part += ["--features", str(m.work / f"{name}.h5"), "--force"]
    (m.work / f"{name}.h5").unlink(missing_ok=True)  # of a run that went on, they are others
    kept = ["--concat", "3", "--details", "-o", str(m.out / f"{name}.json"), "--figure", str(m.out / f"{name}.png")]
    document = m.json("probe", str(run), str(tokens), *part, *kept)
    if document is None:
        return None
    keys = ("protocol", "accuracy", "interval", "layer", "concat", "n_train", "n_test", "chance", "seconds")
    summary = {k: document[k] for k in keys}
    summary["floors"] = {floor: row["accuracy"] for floor, row in document["floors"].items()}
    summary["by_layer"] = {row["layer"]: row["accuracy"] for row in document["layers"]}
    kept = ["--no-floors", "-o", str(m.out / f"{name}-few.json"), "--figure", str(m.out / f"{name}-few.png")]
    few = ["--labels-per-class", "2" if m.toy else "4,25,400", "--repeats", "2" if m.toy else "5"]
    if m.left() > LEAST and (document := m.json("probe", str(run), str(tokens), *part, *few, *kept)):
        summary["few_labels"] = [{k: v for k, v in row.items() if k != "repeats"} for row in document["few_labels"]]
        summary["few_labels_seconds"] = document["seconds"]
    return summary


def tuned(m: Measurement, run: Path, tokens: Path, out: Path, more: list[str]) -> dict | None:
    """The result of fine-tuning for a third of the time left."""
    seconds = 3 if m.toy else max(10, m.left() / 3 - BEFORE_TRAINING)
    recipe = "--val-images 16 --test-images 16" if m.toy else "--augment crop-flip"
    budget = ["--budget", f"{seconds:.0f}s", "-o", str(out), "--force"]
    return m.json("finetune", str(run), str(tokens), *recipe.split(), *budget, *more)


def compare(m: Measurement) -> None:
    """One recipe, one time for each; a model of pixels stands beside them if `train` left one."""
    tokens, wanted = m.work / ("embedded-32.h5" if m.toy else "cifar10.h5"), TOY_COMPARED if m.toy else COMPARED
    if m.toy and not tokens.exists():
        m.igpt("tokenize", "-p", "builtin:igpt-tiny", "--limit", "96", "-o", str(tokens))
    elif not m.toy and not prepare(m, tokens, os.environ.get("IGPT_CIFAR10")):
        return
    seconds = max(10, (m.left() - PROBING) / len(wanted) - BEFORE_EACH)
    size = ["--steps", "1", "-b", "4", "--val-images", "8"] if m.toy else ["--augment", "crop-flip", "-b", "128"]
    size += [] if m.toy else ["--budget", f"{seconds:.0f}s"]
    runs = []
    for line in wanted:
        name, *more = line.split()
        more = [str(m.work / word) if word in wanted else word for word in more]  # a teacher is a run
        shutil.rmtree(m.work / name, ignore_errors=True)
        if m.igpt("train", name, str(tokens), *more, *size, "-o", str(m.work / name)):
            runs.append(m.work / name)
    pixels = m.work / "cifar10-mingpt"
    runs += [pixels] if (pixels / "config.json").exists() and not m.toy else []
    part = ["--train-images", "40", "--test-images", "20"] if m.toy else ["--precision", "bfloat16"]
    out = ["--mixed-budgets", "-o", str(m.out / "compared"), "--force"]
    m.found["compare"] = m.json("compare", *map(str, runs), str(tokens), *part, *out)


def prepare(m: Measurement, tokens: Path, images: str | None) -> bool:
    """A palette and a token file of the images (None: the embedded ones), unless they are there."""
    palette, toy = tokens.with_suffix(".npz"), ["--limit", "96"] if m.toy else []
    source = [str(Path(images).resolve())] if images else []
    if not images and tokens.stem == "cifar10" and not m.toy:
        return tokens.exists()
    if not palette.exists():
        m.igpt("palette", "fit", *source, "-o", str(palette), *(["-k", "16", "-r", "8", *toy] if toy else []))
    if not tokens.exists() and palette.exists():
        small = ["-r", "8", "--allow-size", *toy] if toy else []
        m.igpt("tokenize", *source, "-p", str(palette), "-o", str(tokens), *small)
    return tokens.exists()


STAGES = {
    "tests": tests,
    "bench": bench,
    "train": train,
    "tiny": tiny,
    "sample": sample,
    "probe": probe,
    "compare": compare,
}


# What is kept, and how it reads.


def described(run: Path) -> dict:
    """A run's result, with its settings and the loss on held-out images each time it was taken."""
    if not (run / "config.json").exists():
        return {"failed": "see log.txt"}
    config, steps, held_out = json.loads((run / "config.json").read_text()), [], []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            (held_out if "val_loss" in record else steps).append(record)
    last = {k: steps[-1].get(k) for k in ("epoch", "tokens", "tokens_per_second", "mfu", "memory")} if steps else {}
    curve = [[r["epoch"], round(r["val_loss"], 4)] for r in held_out]
    parts = {k: config.get(k) for k in ("result", "model", "training", "machine")}
    return {**parts, "last": last, "held_out_by_epoch": curve}


def keep(m: Measurement, run: Path, name: str, files: tuple[str, ...]) -> None:
    """The small files of a run as one archive in OUT, and its curve."""
    with tarfile.open(m.out / f"{name}.tar.gz", "w:gz") as archive:
        for file in files:
            if (run / file).exists():
                archive.add(run / file, f"{name}/{file}")
    if (run / "loss.png").exists():
        shutil.copyfile(run / "loss.png", m.out / f"{name}-loss.png")


def page(found: dict) -> str:
    """summary.md"""
    on = found.get("machine", {})
    lines = ["# Measured", "", f"{on.get('device_name')}, {json.dumps(on.get('versions'))}, {found.get('date')}"]
    if rows := found.get("bench"):
        lines += ["", "| igpt bench train | implementation | batch | ms/step | tokens/s | MFU | GB | igpt is |"]
        lines += ["|---|---|---|---|---|---|---|---|", *(map(bench_row, rows))]
    if rows := found.get("sample"):
        lines += [
            "",
            "| igpt bench sample | implementation | batch | pixels | ms/step | images/s | first s | GB | igpt is |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|", *(map(sample_row, rows))]
    for name in ("train", "tiny"):
        if (run := found.get(name)) and "result" in run:
            best = run["result"].get("best") or {}
            lines += ["", f"{name}: {run['result']['steps']} steps, epoch {run['last'].get('epoch')}"]
            lines += [f"last held-out loss {run['result']['val_loss']}, best {best.get('val_loss')}, {run['last']}"]
            lines += [f"{key}: {json.dumps(run[key])}" for key in run if key.startswith("test")]
            lines += ["by epoch: " + ", ".join(f"{e:g} {loss}" for e, loss in run["held_out_by_epoch"])]
    for name, part in found.get("probe", {}).items():
        lines += ["", f"probe, {name}: {json.dumps(part)}"]
    if "tests" in found:
        lines += ["", "```", found["tests"][-1500:], "```"]
    lines += ["", "| seconds | exit | command |", "|---|---|---|"]
    lines += [f"| {s['seconds']} | {'cut' if s['cut'] else s['code']} | `{s['command']}` |" for s in found["steps"]]
    return "\n".join(lines) + "\n"


def bench_row(row: dict) -> str:
    if row.get("tokens_per_second") is None:
        return f"| {row['line']} | {row.get('implementation', '')} | {row.get('failed')} | | | | | |"
    mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    memory = "" if row["memory"] is None else f"{row['memory'] / 1e9:.1f}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x as fast"
    batch = f"{row['batch_size'] // row['micro_batch']} x {row['micro_batch']}"
    return (
        f"| {row['line']} | {row['implementation']} | {batch} | {row['ms_per_step']:.1f} "
        f"| {row['tokens_per_second']:,.0f} | {mfu} | {memory} | {ratio} |"
    )


def sample_row(row: dict) -> str:
    if row.get("ms_per_step") is None:
        return f"| {row['line']} | {row.get('implementation', '')} | {row.get('failed')} | | | | | | |"
    speed = "" if row["images_per_second"] is None else f"{row['images_per_second']:.3g}"
    memory = "" if row["memory"] is None else f"{row['memory'] / 1e9:.1f}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x as fast"
    return (
        f"| {row['line']} | {row['implementation']} | {row['batch_size']} | {row['pixels']} | {row['ms_per_step']:.3f} "
        f"| {speed} | {row['first_seconds']:.1f} | {memory} | {ratio} |"
    )


def measure(m: Measurement, stages: list[str]) -> None:
    """The stages one after the other, each with its share of the time left."""
    seen = m.run(
        sys.executable, "-c", "import json; from igpt_cli.bench.machine import machine; print(json.dumps(machine()))"
    )
    m.found["machine"] = json.loads(seen) if seen else {}
    m.found["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    for i, stage in enumerate(stages):
        now = time.monotonic()
        m.stage_end = now + (m.end - now) * SHARES[stage] / sum(SHARES[s] for s in stages[i:])
        if m.left() < LEAST:
            print(f"{stage}: left out, {m.left():.0f} s are too little", flush=True)
            continue
        print(f"{stage}: {m.left():.0f} s", flush=True)
        STAGES[stage](m)
        m.save()
    print((m.out / "summary.md").read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for large files; default OUT/work")
    parser.add_argument("--stages", default=",".join(DEFAULT), help=f"some of {','.join(STAGES)}; default %(default)s")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it; default %(default)s")
    parser.add_argument("--resume", action="store_true", help="add to the results in OUT, resume the run in WORK")
    parser.add_argument(
        "--train-minutes", type=float, help="what the schedule of `train` is fitted to; default this call"
    )
    parser.add_argument("--train", default=None, help=f"how to train; default {TRAIN}")
    parser.add_argument("--toy", action="store_true", help="toy sizes: does the script work?")
    given = parser.parse_args(arguments)
    stages = given.stages.split(",")
    if unknown := [s for s in stages if s not in STAGES]:
        parser.error(f"unknown stages {', '.join(unknown)}; there are {', '.join(STAGES)}")
    out, work = given.out.resolve(), (given.work or given.out / "work").resolve()
    if not given.resume:
        (out / "summary.json").unlink(missing_ok=True)
        (out / "log.txt").unlink(missing_ok=True)
        if "train" in stages and (work / "cifar10-mingpt").exists():
            parser.error(f"{work / 'cifar10-mingpt'} is there already; go on with --resume, or remove it")
    m = Measurement(
        out, work, 60 * given.minutes, given.toy, given.train_minutes and 60 * given.train_minutes,
        given.train or (TOY_TRAIN if given.toy else TRAIN),
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measure(m, stages)


if __name__ == "__main__":
    main()
