"""Files from a stranger cannot run code: a pickle that would is planted in every file that is read."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from training_runs import stop_at, write_tokens

from igpt_cli.errors import FormatError, IgptError, Interrupted
from igpt_cli.model_dir import load_model
from igpt_cli.probing.feature_file import open_features
from igpt_cli.probing.store import extract_features
from igpt_cli.tokens.store import open_tokens
from igpt_cli.training.checkpoint import read_index
from igpt_cli.training.run import pretrain, resume
from igpt_cli.training.settings import Execution, PretrainSettings

RECIPE = PretrainSettings(n_layer=1, n_embd=8, steps=6, batch_size=6, optimizer="adamw")


class Trap:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """Its pickles, by how they are written; at the end none has been sprung."""
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    sprung.unlink()  # it works
    saved = io.BytesIO()
    torch.save(Trap(sprung), saved)
    array = io.BytesIO()
    np.save(array, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("centers.npy", array.getvalue())
    yield {
        "plain": pickle.dumps(Trap(sprung)),
        "old": pickle.dumps(Trap(sprung), protocol=0),
        "torch": saved.getvalue(),
        "npy": array.getvalue(),
        "npz": archive.getvalue(),
    }
    assert not sprung.exists()


@pytest.fixture
def stopped(tmp_path):
    """A run that was stopped at step 3 and can be resumed, and its tokens."""
    tokens, run = open_tokens(write_tokens(tmp_path / "t.h5")), tmp_path / "run"
    with pytest.raises(Interrupted):
        pretrain(tokens, run, RECIPE, Execution(precision="float32"), device="cpu", on_record=stop_at(3))
    return tokens, run


def test_a_run_with_a_pickle_in_any_file_is_refused_or_resumed_and_never_run(stopped, trap, tmp_path):
    tokens, run = stopped
    files = [p.relative_to(run) for p in run.rglob("*") if p.is_file()]
    assert {".metadata", "__0_0.distcp", "model.safetensors", "palette.npz"} <= {p.name for p in files}
    for file in files:
        for kind, content in trap.items():
            copy = tmp_path / "copy"
            shutil.copytree(run, copy)
            (copy / file).write_bytes(content)
            try:
                load_model(copy)
                resume(tokens, copy, device="cpu")
            except FormatError as e:
                assert str(copy) in str(e), (file, kind)  # noqa: PT017
            except IgptError as e:
                assert "cannot be resumed" in str(e), (file, kind)  # noqa: PT017
            shutil.rmtree(copy)


def test_the_index_of_a_checkpoint_names_what_it_asks_for_beyond_tensors(stopped, trap):
    tokens, run = stopped
    (folder,) = (run / "checkpoints").glob("step-*")
    metadata = folder / "state" / ".metadata"
    metadata.write_bytes(trap["plain"])
    with pytest.raises(
        FormatError, match=r"state cannot be read \(it asks for pathlib.+, which no optimizer's state ne"
    ):
        resume(tokens, run, device="cpu")


def test_an_entry_that_is_no_tensor_is_not_unpickled(stopped, trap):
    """The index is sound, and says that an entry is an object, which torch would unpickle from the other file."""
    tokens, run = stopped
    (state,) = (run / "checkpoints").glob("step-*/state")
    index = read_index(state)
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    name = next(iter(index.state_dict_metadata))
    index.state_dict_metadata[name] = BytesStorageMetadata()
    (state / ".metadata").write_bytes(pickle.dumps(index))
    (state / "__0_0.distcp").write_bytes(trap["torch"])
    with pytest.raises(FormatError, match="is no tensor"):
        resume(tokens, run, device="cpu")


@pytest.mark.parametrize("path", ["../../../elsewhere", "/etc/passwd", "", None, 7])
def test_an_index_that_leads_elsewhere_is_refused(stopped, path):
    _, run = stopped
    (state,) = (run / "checkpoints").glob("step-*/state")
    index = read_index(state)
    index.storage_data = {k: replace(v, relative_path=path) for k, v in index.storage_data.items()}
    (state / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(FormatError, match="names the file"):
        read_index(state)


@pytest.mark.parametrize("value", [None, 3, [], {}, torch.float32, torch.Size([2])], ids=repr)
def test_an_index_of_another_kind_is_refused(tmp_path, value):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(FormatError, match="its index .metadata holds a"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["palette.npz", "palette.npy", "preprocessor_config.json"])
def test_a_palette_runs_nothing(trap, tmp_path, name):
    from igpt_cli.palette.palette import Palette

    for content in trap.values():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(IgptError):
            Palette.load(tmp_path / name)


def test_openai_arrays_run_nothing(trap, tmp_path):
    from igpt_cli.tokens.import_ import find_arrays, import_openai

    tokens = open_tokens(write_tokens(tmp_path / "t.h5"))
    for content in trap.values():
        (tmp_path / "a_trX.npy").write_bytes(content)
        with pytest.raises(IgptError):
            import_openai(find_arrays(tmp_path / "a"), tokens.palette, tmp_path / "out.h5")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_an_import_runs_nothing(trap, tmp_path, name):
    from igpt_cli.interop.huggingface import import_huggingface

    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "imagegpt", "n_layer": 1, "n_embd": 8, "n_head": 1}')
    for content in trap.values():
        (folder / name).write_bytes(content)
        with pytest.raises(IgptError):
            import_huggingface(folder, tmp_path / "model")


def test_a_feature_file_runs_nothing(stopped, trap, tmp_path):
    tokens, run = stopped
    extract_features(load_model(run), tokens, tmp_path / "f.h5", layers=[0, 1])
    for content in trap.values():
        copy = tmp_path / "g.h5"
        shutil.copyfile(tmp_path / "f.h5", copy)
        with h5py.File(copy, "r+") as file:
            file.attrs["model"] = np.void(content)
            file["train"].attrs["names_pickled"] = np.void(content)
        with pytest.raises(FormatError):
            open_features(copy)
        copy.write_bytes(content)
        with pytest.raises(FormatError):
            open_features(copy)
