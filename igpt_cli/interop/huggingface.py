"""Hugging Face's ImageGPT: import and export.

Their form of the same model: row V of `wte` is the start of sequence; linear maps are stored (in, out) and have biases,
which the paper's model has not; all is causal, so a BERT model has no place there.

D width (n_embd), V palette size (n_vocab), T positions (resolution * resolution), L blocks (n_layer).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from igpt_cli.documents import read_json, write_json
from igpt_cli.errors import FormatError, InputError, MismatchError
from igpt_cli.files import check_folder, replacing_folder
from igpt_cli.interop.huggingface_rgb import CLASSES, MODEL_TYPES, export_rgb, import_rgb
from igpt_cli.interop.keys import fixed_problems, is_size
from igpt_cli.interop.stored import DTYPES, Stored, open_tensors, read_text, without_wrappers
from igpt_cli.interop.weights import describe_read, differences, refuse, require_apart
from igpt_cli.model_dir import CONFIG, PALETTE, load_model, new_config, read_config, write_model, write_weights
from igpt_cli.palette.formats import preprocessor_config, read_palette
from igpt_cli.palette.palette import Palette
from igpt_cli.workspace import resolve_run

MODEL_TYPE, PROCESSOR = "imagegpt", "preprocessor_config.json"

#: What iGPT has, whatever its size: {key of their config: (value, why)}. A missing key has this value in transformers.
FIXED: dict[str, tuple[Any, str]] = {
    "activation_function": ("quick_gelu", "x * sigmoid(1.702 x)"),
    "layer_norm_epsilon": (1e-5, "inside the root of the norm"),
    "tie_word_embeddings": (False, "the output head is a matrix of its own"),
    "scale_attn_weights": (True, "scores are divided by the root of the head's width"),
    "scale_attn_by_inverse_layer_idx": (False, "scores do not depend on the layer"),
    "add_cross_attention": (False, "there is nothing else to attend to"),
}
SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")

#: Masks that old versions of transformers saved with the weights.
BUFFER = re.compile(r"h\.[0-9]+\.attn\.(masked_)?bias")
PREFIX, HEAD, CLASSIFIER = "transformer.", "lm_head.weight", "score.weight"


def import_huggingface(
    folder: str | Path,
    out: str | Path,
    *,
    palette: str | Path | None = None,
    no_head: bool = False,
    resolution: int | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make a model directory of a folder that `save_pretrained` of transformers' ImageGPT, ViT, DeiT or Swin wrote.

    Weights in float32 come out bit by bit; float16 and bfloat16 become float32, which holds them exactly.

    Args:
        folder: config.json, the weights (model.safetensors, pytorch_model.bin, or several of either with their index),
            and preprocessor_config.json: ImageGPT's clusters, the palette, or how images are prepared.
        out: the model directory to write.
        palette: of an ImageGPT, whatever `Palette.load` takes, instead of preprocessor_config.json.
        no_head: take an ImageGPT that lacks lm_head.weight, and give it zeros for a head.
        resolution: of a ViT or DeiT, another image side; its positions are resized.
        force: replace a model directory that is there.
        note: called with what is excluded or differs without harm.

    Returns:
        What config.json says; `imported` says where the model came from.

    Raises:
        InputError, FormatError, MismatchError: it is none of them, or not one that can be had here: one message says
            all that differs.
        OutputError: something is at `out`, or it cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; a model on the Hugging Face hub is downloaded first: "
            f"hf download OWNER/NAME --local-dir DIR"
        )
    require_apart(folder, out)
    theirs = read_json(folder / CONFIG, "a model's config.json")
    if str(theirs.get("model_type")) in MODEL_TYPES:
        if palette is not None or no_head:
            raise InputError(f"{folder} is a {theirs['model_type']}: a palette, or no head, is for an ImageGPT")
        check_folder(out, CONFIG, force)
        return import_rgb(folder, out, theirs, resolution=resolution, force=force, note=note)
    if resolution is not None:
        raise InputError("another resolution is for a ViT or DeiT, whose positions can be resized")
    check_folder(out, PALETTE, force)
    model = _model_part(folder / CONFIG, theirs)
    colours = _palette(folder, palette, model["resolution"], note)
    if colours.n_vocab != model["n_vocab"]:
        raise MismatchError(
            f"{folder / CONFIG} has vocab_size {model['n_vocab'] + 1}: {model['n_vocab']} colours and the start of "
            f"sequence; the palette, {palette or folder / PROCESSOR}, has {colours.n_vocab} colours"
        )
    file, stored = open_tensors(folder)
    stored, left_out = _named_alike(file, without_wrappers(file, stored, note), note)
    _require_model(file, stored, model, no_head)
    weights = _to_ours(file, stored, model)
    imported = {
        "from": str(folder),
        "form": "huggingface",
        "weights": file.name,
        "dtype": ", ".join(sorted({t.dtype for t in stored.values()})),
        "transformers_version": read_text(theirs, "transformers_version"),
        "left_out": left_out,
        "head": "lm_head" if HEAD in stored else "zeros",
        "palette": str(palette or folder / PROCESSOR),
        "palette_sha256": colours.sha256,
        "n_parameters": sum(w.numel() for w in weights.values()),
    }
    config = new_config(model, imported=imported)
    write_model(out, weights, colours, config, force)
    return config


def export_huggingface(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write a model as a folder that transformers' `from_pretrained` reads: an ImageGPT, ViT, DeiT or Swin.

    Biases of an ImageGPT are zeros, and dropout is 0 as in the paper, so that fine-tuning starts from the same model.
    The class head of a fine-tuned iGPT is excluded.

    Args:
        run: a model directory, "latest" or "builtin:<name>"; an iGPT of objective "ar".
        out: the folder to write.
        dtype: "float32", or "bfloat16", to which the weights are rounded.
        force: replace a folder that has a preprocessor_config.json.
        note: called with what differs without harm.

    Returns:
        path, dtype, model, n_parameters; of an ImageGPT also n_biases (zeros that are added) and palette_sha256, of the
        others `architecture`, their class.

    Raises:
        InputError: a BERT model, which transformers cannot run, or an unknown dtype.
        OutputError: something is at `out`, or it cannot be written.
    """
    path, out = resolve_run(run), Path(out)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; weights are written as {' or '.join(DTYPES)}")
    model = read_config(path)["model"]
    if model.get("backend") in CLASSES:
        return export_rgb(path, out, dtype=dtype, force=force, note=note)
    if model.get("backend") != "igpt" or model.get("objective") != "ar":
        raise InputError(
            f"{path} is {model.get('backend')!r} with objective {model.get('objective')!r}; transformers' ImageGPT is "
            f"always autoregressive: every position sees only those before it, so it would compute something else"
        )
    require_apart(path, out)
    check_folder(out, PROCESSOR, force)
    loaded = load_model(path)
    palette = loaded.palette
    assert palette is not None  # `load_model` refuses an iGPT without one
    if classes := model.get("n_classes"):
        note(f"excluded: the class head, of {classes} classes, for which transformers' model of pixels has no place")
    if math.isqrt(width := model["n_embd"] // model["n_head"]) ** 2 != width:
        note(f"use transformers 5.21 or later: older ones divide scores by {math.isqrt(width)}, not {width**0.5:.2f}")
    theirs, n_biases = _to_theirs(loaded.model.state_dict(), model), 9 * model["n_embd"] * model["n_layer"]
    with replacing_folder(out) as part:
        write_weights(part, theirs, DTYPES[dtype])
        write_json(_their_config(model, dtype), part / CONFIG)
        write_json(preprocessor_config(palette, model["resolution"]), part / PROCESSOR)
    return {
        "path": str(out),
        "dtype": dtype,
        "model": model,
        "n_parameters": sum(tensor.numel() for tensor in theirs.values()) - n_biases,
        "n_biases": n_biases,
        "palette_sha256": palette.sha256,
    }


# Their config and palette.


def _model_part(file: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """`model` of our config.json.

    Raises:
        FormatError: another kind of model, or settings that iGPT has not.
    """
    if theirs.get("model_type") != MODEL_TYPE:
        hint = "; it is a model directory of igpt already" if theirs.get("format") == "igpt-model" else ""
        if "pretrained_cfg" in theirs:
            hint = f"; it is timm's: igpt import timm {file.parent}"
        known = " or ".join((MODEL_TYPE, *MODEL_TYPES))
        raise FormatError(f"{file} has model_type {short(theirs.get('model_type'))}, expected {known}{hint}")
    problems = [f"{k} is {short(theirs.get(k))}, expected a whole number" for k in SIZES if not is_size(theirs.get(k))]
    problems += fixed_problems(theirs, FIXED, "iGPT")
    refuse(file, problems)
    n_positions, width = theirs["n_positions"], 4 * theirs["n_embd"]
    resolution = math.isqrt(n_positions)
    if theirs.get("n_inner") not in (None, width):
        problems.append(f"n_inner is {short(theirs['n_inner'])}, iGPT has 4 * n_embd = {width}")
    if resolution**2 != n_positions:
        problems.append(f"n_positions is {n_positions}, which is no square, so not the pixels of a square image")
    refuse(file, problems)
    sizes = {key: theirs[key] for key in ("n_layer", "n_head", "n_embd")}
    sizes |= {"resolution": resolution, "n_vocab": theirs["vocab_size"] - 1, "objective": "ar"}
    return describe_read(file, "igpt", sizes)


def _palette(folder: Path, given: str | Path | None, resolution: int, note: Callable[[str], None]) -> Palette:
    """The palette given, or the clusters of preprocessor_config.json, which compares them with pixels in -1..1."""
    if given is not None:
        return Palette.load(given)
    if not (folder / PROCESSOR).exists():
        raise InputError(
            f"{folder} has no {PROCESSOR}, and tokens mean nothing without their palette; name it with --palette"
        )
    processor = read_json(folder / PROCESSOR, "the model's palette")
    if processor.get("do_normalize", True) is not True or processor.get("do_rescale", True) is not True:
        raise FormatError(
            f"{folder / PROCESSOR} does not both do_rescale and do_normalize, so its clusters are not in -1..1; "
            f"name the palette with --palette"
        )
    size = processor.get("size")
    if size not in (None, resolution, {"height": resolution, "width": resolution}):
        note(f"{PROCESSOR} resizes images to {short(size)}, the model has {resolution}x{resolution} positions")
    return read_palette(folder / PROCESSOR, "-1..1")


def _their_config(model: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["ImageGPTForCausalImageModeling"],
        "model_type": MODEL_TYPE,
        "vocab_size": model["n_vocab"] + 1,
        "n_positions": model["resolution"] ** 2,
        **{key: model[key] for key in ("n_embd", "n_layer", "n_head")},
        "n_inner": None,
        **{key: value for key, (value, _) in FIXED.items()},
        "reorder_and_upcast_attn": False,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
    }


# Tensors.


def _pairs(model: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, their name, their shape) of every tensor; ours is "" for `wte` with `sos` below it, and for biases."""
    D, V = model["n_embd"], model["n_vocab"]
    linears = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
    yield "", "wte.weight", (V + 1, D)
    yield "wpe", "wpe.weight", (model["resolution"] ** 2, D)
    for at in (f"h.{layer}." for layer in range(model["n_layer"])):
        for norm in ("ln_1", "ln_2"):
            yield f"{at}{norm}.g", f"{at}{norm}.weight", (D,)
        for linear, (n_in, n_out) in linears.items():
            yield f"{at}{linear}.weight", f"{at}{linear}.weight", (n_in, n_out)
            yield "", f"{at}{linear}.bias", (n_out,)
    yield "ln_f.g", "ln_f.weight", (D,)
    yield "wtet.weight", HEAD, (V, D)


def _turned(name: str, tensor: Tensor) -> Tensor:
    """A linear map of a block, (in, out) there and (out, in) here; any other tensor as it is."""
    return tensor.T if name.startswith("h.") and tensor.ndim == 2 else tensor


def _named_alike(
    file: Path, stored: dict[str, Stored], note: Callable[[str], None]
) -> tuple[dict[str, Stored], list[str]]:
    """Tensors by their name without "transformer.", masks excluded; and the names of others excluded."""
    alike: dict[str, Stored] = {}
    for name, tensor in stored.items():
        bare = name.removeprefix(PREFIX)
        if bare in alike:
            raise FormatError(f"{file} has {bare} twice, with and without {PREFIX!r}")
        alike[bare] = tensor
    alike = {name: tensor for name, tensor in alike.items() if not BUFFER.fullmatch(name)}
    left_out = [CLASSIFIER] if CLASSIFIER in alike else []
    for name in left_out:
        note(f"excluded: {name} {alike.pop(name).shape}, the head of a classifier")
    return alike, left_out


def _require_model(file: Path, stored: Mapping[str, Stored], model: dict[str, Any], no_head: bool) -> None:
    """Every tensor by name, shape and type, from what the file says of itself; nothing is read yet.

    Raises:
        FormatError: with all that differs.
    """
    blocks = {int(m[1]) for name in stored if (m := re.match(r"h\.([0-9]{1,9})\.", name))}
    if len(blocks) != model["n_layer"]:  # before their names are made, of which a hostile n_layer asks for any number
        raise FormatError(f"{file} has {len(blocks)} blocks, its {CONFIG} says n_layer {model['n_layer']}")
    expected = {theirs: shape for _, theirs, shape in _pairs(model)}
    if HEAD not in stored:
        if not no_head:
            raise FormatError(
                f"{file} has no {HEAD}, as a classifier or a bare ImageGPTModel: it can be probed, but not sampled or "
                f"evaluated; --no-head takes it so, with zeros for a head"
            )
        del expected[HEAD]
    problems = differences({name: tensor.shape for name, tensor in stored.items()}, expected)
    problems += [
        f"{name} is {tensor.dtype}; float32, float16 and bfloat16 can be read"
        for name, tensor in stored.items()
        if tensor.dtype not in ("float32", "float16", "bfloat16")
    ]
    refuse(file, problems)


def _to_ours(file: Path, stored: Mapping[str, Stored], model: dict[str, Any]) -> dict[str, Tensor]:
    """Our state dict, float32.

    Raises:
        FormatError: values that are not finite, or biases that are not zero.
    """
    problems = []

    def take(name: str) -> Tensor:
        tensor = stored[name].read().to(torch.float32)
        if not torch.isfinite(tensor).all():
            problems.append(f"{name} holds NaN or infinity")
        return tensor

    biases = {name: float(take(name).abs().max()) for name in stored if name.endswith(".bias")}
    refuse(file, problems)
    if nonzero := [name for name, largest in biases.items() if largest]:
        worst = max(nonzero, key=biases.__getitem__)
        raise FormatError(
            f"{file} has {len(nonzero)} biases that are not zero, and iGPT has none; the largest value is "
            f"{biases[worst]:g}, in {worst}. Fine-tuning in transformers trains them unless they are frozen; without "
            f"them it would be another model"
        )
    wte = take("wte.weight")
    weights = {"wte.weight": wte[:-1].clone(), "sos": wte[-1].clone()}
    for ours, theirs, _ in _pairs(model):
        if ours and theirs in stored:
            weights[ours] = _turned(ours, take(theirs))
    weights.setdefault("wtet.weight", torch.zeros(model["n_vocab"], model["n_embd"]))
    refuse(file, problems)
    return weights


def _to_theirs(ours: Mapping[str, Tensor], model: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of their causal model."""
    theirs = {name: _turned(own, ours[own]) if own else torch.zeros(shape) for own, name, shape in _pairs(model)}
    theirs["wte.weight"] = torch.cat((ours["wte.weight"], ours["sos"][None]))
    return {name if name == HEAD else PREFIX + name: tensor for name, tensor in theirs.items()}
