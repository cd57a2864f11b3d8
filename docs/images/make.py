"""Make every picture of the README and the pages again, with the models that ship.

    python docs/images/make.py --cifar10 cifar10-jpeg.tar.gz [NAME ...]

Without names, all of them. Pictures of photographs need CIFAR-10 (any form that `igpt data info` knows) and are passed
over without it; report.png is a screenshot and needs Chromium. On two CPU cores it takes about an hour, nearly all of
it for the layer curves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TINY, PHOTOS = "builtin:igpt-tiny", "builtin:igpt-photos"
ALL = "--train-images all --test-images all"
CIFAR = "--train-images 4000 --test-images 2000"

#: name: the commands that make it; OUT is the picture, CIFAR the archive, WORK a folder for what is thrown away.
PICTURES = {
    "completed.png": [f"complete {TINY} embedded --limit 6 -n 4 --temperature 0.9 -o OUT"],
    "completed-photos.png": [f"complete {PHOTOS} CIFAR --limit 6 -n 4 --temperature 0.9 -o OUT"],
    "completed-1.png": [f"complete {TINY} embedded --limit 4 -n 4 -o OUT"],
    "completed-photos-1.png": [f"complete {PHOTOS} CIFAR --limit 4 -n 4 -o OUT"],
    "samples.png": [f"sample {TINY} -n 16 --temperature 0.9 --seed 1 -o OUT"],
    "samples-photos.png": [f"sample {PHOTOS} -n 16 --temperature 0.9 --seed 1 -o OUT"],
    "filling.gif": [f"sample {TINY} -n 4 --temperature 0.9 -o WORK/filling.png --gif OUT"],
    "nearest.png": [
        f"tokenize embedded -p {TINY} -o WORK/emoji.h5",
        f"sample {TINY} -n 6 --temperature 0.9 --nearest WORK/emoji.h5 -o OUT",
    ],
    "surprise-map.png": [f"evaluate {TINY} embedded --limit 8 --map OUT"],
    "position-map.png": [f"evaluate {TINY} embedded --limit 500 --position-map OUT"],
    "attention.png": [f"attention {TINY} embedded --pixel 18,14 -o OUT"],
    "layer-curve.png": [f"probe {TINY} embedded {ALL} --labels-per-class 4,16,64 --precision auto --figure OUT"],
    "layer-curve-photos.png": [
        f"probe {PHOTOS} CIFAR {CIFAR} --labels-per-class 4,25,300 --precision auto --figure OUT"
    ],
    "losses.png": [f"report {TINY} {PHOTOS} --no-probe --no-samples --figure OUT -o WORK/report.html"],
}


def make(name: str, cifar: str | None) -> None:
    """Run the commands of one picture."""
    with tempfile.TemporaryDirectory() as work:
        for command in PICTURES[name]:
            words = [
                {"OUT": str(HERE / name), "CIFAR": cifar or ""}.get(w, w.replace("WORK", work)) for w in command.split()
            ]
            print(f"{name}: {' '.join(words)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "igpt_cli", *words, "--force"], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--cifar10", help="CIFAR-10, for the pictures of photographs")
    asked = parser.parse_args()
    for name in asked.names or PICTURES:
        if asked.cifar10 or not any("CIFAR" in command for command in PICTURES[name]):
            make(name, asked.cifar10)
