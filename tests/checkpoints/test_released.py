"""Reading released `.pt` files, reading and writing the own format, and what is refused."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from elit_export.checkpoints.native import FORMAT, load_checkpoint, save_checkpoint
from elit_export.checkpoints.released import released_name
from elit_export.errors import CheckpointError
from elit_export.models.registry import named_spec
from elit_export.models.sit import ElitSiT
from elit_export.spec import SD_VAE, DataFacts, ModelSpec
from tests.helpers import Golden, golden, max_relative, tiny_model, tiny_spec

READ = "input_token_editor.adapters.0."
LATENT_POSITIONS = f"{READ}latent_pos_embed"
QUERIES = f"{READ}learned_query_embed"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def qknorm() -> Golden:
    """The smaller golden model: 3 heads, 1-2-2 blocks, heads readable from its shapes."""
    return golden("tiny_g2_qknorm")


@pytest.fixture(scope="module")
def ema(qknorm: Golden) -> Weights:
    return qknorm.ema


def save_edited(path: Path, ema: Weights, edit: Callable[[Weights], object]) -> Path:
    """A released file whose `ema` went through `edit`."""
    edited = dict(ema)
    edit(edited)
    torch.save({"ema": edited, "args": namespace(encoder_depth=1)}, path)
    return path


def namespace(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**values)


# ---------------------------------------------------------------- released files


@torch.inference_mode()
def test_a_released_file_gives_the_velocity_of_its_ema(any_golden: Golden, tmp_path: Path) -> None:
    model = any_golden.load(tmp_path)
    arrays = any_golden.arrays("forward")
    x, t, y = (torch.from_numpy(arrays[name]) for name in "xty")
    kept = any_golden.budgets[0]
    assert max_relative(model(x, t, y, torch.arange(kept)).numpy(), arrays[f"v_k{kept}"]) <= 1e-6
    assert model.spec == any_golden.spec
    assert model.data == SD_VAE
    assert not model.training


def test_every_tensor_comes_from_ema_under_its_own_name(any_golden: Golden, tmp_path: Path) -> None:
    model, ema = any_golden.load(tmp_path), any_golden.ema
    assert {released_name(name, model.spec) for name in model.state_dict()} == set(ema)
    for name, tensor in model.state_dict().items():
        released = ema[released_name(name, model.spec)]
        assert torch.equal(tensor, released[: len(tensor)]), name


def test_only_the_used_rows_of_the_latent_positions_are_kept(qknorm: Golden, tmp_path: Path) -> None:
    assert qknorm.ema[LATENT_POSITIONS].shape == (4096, 48)
    table = qknorm.load(tmp_path).read.latent_pos_embed
    assert torch.equal(table, qknorm.ema[LATENT_POSITIONS][:16])


def test_half_precision_weights_are_read_as_float32(qknorm: Golden, tmp_path: Path) -> None:
    path = qknorm.save_pt(tmp_path / "half.pt", ema={name: tensor.half() for name, tensor in qknorm.ema.items()})
    model = load_checkpoint(path, tail_depth=2)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.read.query, qknorm.ema[QUERIES].half().float())


@pytest.mark.parametrize(("channels", "vae"), [(1, ""), (3, ""), (4, "stabilityai/sd-vae-ft-ema"), (16, "unknown")])
def test_the_number_of_channels_tells_pixels_from_the_known_vae(tmp_path: Path, channels: int, vae: str) -> None:
    path = save_named(tmp_path, spec=tiny_spec(in_channels=channels), args=namespace(encoder_depth=1))
    data = load_checkpoint(path, num_heads=2, tail_depth=1).data
    assert (data.kind, data.vae) == ("vae" if vae else "pixels", vae)


def test_reading_allows_no_class_for_good(qknorm: Golden, tmp_path: Path) -> None:
    qknorm.load(tmp_path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# ---------------------------------------------------------------- numbers that shapes do not tell


@pytest.mark.parametrize("head_depth", [0, 1, 3])
def test_head_depth_is_the_encoder_depth_of_args(qknorm: Golden, tmp_path: Path, head_depth: int) -> None:
    path = qknorm.save_pt(tmp_path / "a.pt", args=namespace(encoder_depth=head_depth))
    spec = load_checkpoint(path, tail_depth=2).spec
    assert (spec.head_depth, spec.core_depth, spec.tail_depth) == (head_depth, 3 - head_depth, 2)


def test_heads_are_read_from_the_norm_of_each_head(qknorm: Golden, tmp_path: Path) -> None:
    assert load_checkpoint(qknorm.save_pt(tmp_path / "a.pt"), tail_depth=2).spec.num_heads == 3


def save_named(folder: Path, *, spec: ModelSpec, args: argparse.Namespace) -> Path:
    """A released file of any size on little disk: every tensor is one number, stretched."""
    with torch.device("meta"):
        shapes = {released_name(name, spec): tensor.shape for name, tensor in ElitSiT(spec).state_dict().items()}
    shapes[LATENT_POSITIONS] = torch.Size((4096, spec.hidden_size))
    ema = {name: torch.tensor(0.001 * index).expand(shape) for index, (name, shape) in enumerate(shapes.items())}
    path = folder / "named.pt"
    torch.save({"ema": ema, "args": args}, path)
    return path


def small(**changes: Any) -> ModelSpec:
    """What `ELIT-SiT-S/8` at 128 pixels and 7 classes must become."""
    facts = named_spec("ELIT-SiT-S/8", resolution=128).to_dict()
    return ModelSpec(**(facts | {"num_classes": 7} | changes))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"resolution": 128, "num_classes": 7}, small()),
        ({}, small()),
        ({"encoder_depth": 8}, small()),
        ({"encoder_depth": 2}, small(head_depth=2, core_depth=8)),
        ({"elit_group_size": 1}, small(group_size=1)),
        ({"qk_norm": True}, small(qk_norm=True)),
    ],
)
def test_a_named_size_tells_heads_and_tail(tmp_path: Path, args: dict[str, Any], expected: ModelSpec) -> None:
    path = save_named(tmp_path, spec=expected, args=namespace(model="ELIT-SiT-S/8", **args))
    assert load_checkpoint(path).spec == expected


def test_a_named_size_runs(tmp_path: Path) -> None:
    args = namespace(model="ELIT-SiT-S/8", resolution=128, num_classes=7)
    model = load_checkpoint(save_named(tmp_path, spec=small(), args=args))
    velocity = model(torch.ones(1, 4, 16, 16), torch.ones(1), torch.tensor([7]), torch.arange(1))
    assert velocity.shape == (1, 4, 16, 16)
    assert (model.spec.num_heads, model.spec.head_depth, model.spec.core_depth, model.spec.tail_depth) == (6, 8, 2, 2)


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"num_heads": 4}, 6), ({"tail_depth": 3}, 2), ({"head_depth": 4}, 8)],
    ids=lambda value: str(value),
)
def test_a_number_that_contradicts_the_file_is_refused(tmp_path: Path, asked: dict[str, int], told: int) -> None:
    path = save_named(tmp_path, spec=small(), args=namespace(model="ELIT-SiT-S/8", num_classes=7))
    (name, value), *_ = asked.items()
    with pytest.raises(CheckpointError, match=f"{name}={value} was asked for, but the file says {told}; leave it out"):
        load_checkpoint(path, **asked)


def test_a_number_that_agrees_with_the_file_is_taken(tmp_path: Path) -> None:
    path = save_named(tmp_path, spec=small(), args=namespace(model="ELIT-SiT-S/8", num_classes=7))
    assert load_checkpoint(path, num_heads=6, head_depth=8, tail_depth=2).spec == small()


def test_a_size_that_the_weights_do_not_have_is_refused_by_tensor(tmp_path: Path) -> None:
    path = save_named(tmp_path, spec=small(), args=namespace(model="ELIT-SiT-S/8", num_classes=10))
    needed = r"y_embedder.embedding_table.weight has shape \(8, 384\), the model needs \(11, 384\)"
    with pytest.raises(CheckpointError, match=needed):
        load_checkpoint(path)


def test_heads_that_do_not_divide_the_width_are_refused(golden_g4: Golden, tmp_path: Path) -> None:
    path = golden_g4.save_pt(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="hidden_size 64 is not divisible by num_heads 5"):
        load_checkpoint(path, num_heads=5, tail_depth=1)


@pytest.mark.parametrize(
    ("args", "given", "unknown"),
    [
        (namespace(encoder_depth=2), {}, ["num_heads", "tail_depth"]),
        (namespace(encoder_depth=2), {"num_heads": 4}, ["tail_depth"]),
        (namespace(model="ELIT-SiT-XXL/2"), {"tail_depth": 1}, ["num_heads", "head_depth"]),
        (None, {}, ["num_heads", "head_depth", "tail_depth"]),
    ],
)
def test_unknown_numbers_are_asked_for_with_their_options(
    golden_g4: Golden, tmp_path: Path, args: object, given: dict[str, int], unknown: list[str]
) -> None:
    path = golden_g4.save_pt(tmp_path / "a.pt", args=args)
    numbers = {name: given.get(name, "N") for name in ("num_heads", "head_depth", "tail_depth")}
    untold = {name: number for name, number in numbers.items() if name in (*unknown, *given)}
    options = " ".join(f"--{name.replace('_', '-')} {number}" for name, number in untold.items())
    lines = ", ".join(f"{name} = {number}" for name, number in untold.items())
    with pytest.raises(CheckpointError, match=f"cannot tell {', '.join(unknown)}; say it") as caught:
        load_checkpoint(path, **given)
    assert f"table [architecture], {lines}, to load_checkpoint" in caught.value.remedy
    assert caught.value.remedy.endswith(f"elit-export init {path} {options}")


@pytest.mark.parametrize(("tail_depth", "problem"), [(5, "core_depth is -1"), (-1, "tail_depth is -1")])
def test_depths_beyond_the_blocks_there_are_are_refused(
    qknorm: Golden, tmp_path: Path, tail_depth: int, problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(qknorm.save_pt(tmp_path / "a.pt"), tail_depth=tail_depth)


@pytest.mark.parametrize("encoder_depth", ["1", 1.0, None])
def test_an_encoder_depth_that_is_no_whole_number_is_refused(
    qknorm: Golden, tmp_path: Path, encoder_depth: object
) -> None:
    path = qknorm.save_pt(tmp_path / "a.pt", args=namespace(encoder_depth=encoder_depth))
    with pytest.raises(CheckpointError):
        load_checkpoint(path, tail_depth=2)


# ---------------------------------------------------------------- tensors


def test_projectors_are_ignored_and_named(
    qknorm: Golden, ema: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"projectors.0.0.weight": torch.ones(2), "projectors.0.2.bias": torch.ones(2)}
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update(extra))
    with caplog.at_level(logging.WARNING):
        model = load_checkpoint(path, tail_depth=2)
    assert caplog.messages == ["ignored 2 tensors named projectors.* (used in training only)"]
    assert torch.equal(model.read.query, qknorm.ema[QUERIES])


def test_missing_latent_positions_are_zeros_and_named(
    ema: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.pop(LATENT_POSITIONS))
    with caplog.at_level(logging.WARNING):
        model = load_checkpoint(path, tail_depth=2)
    assert len(caplog.messages) == 1
    assert LATENT_POSITIONS in caplog.messages[0]
    assert model.read.latent_pos_embed.shape == (16, 48)
    assert not model.read.latent_pos_embed.any()


def test_a_whole_file_logs_nothing(qknorm: Golden, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qknorm.load(tmp_path)
    assert not caplog.messages


HEAD_NORM = "blocks.0.attn.q_norm.weight"  # without it, a model without such norms
NAMES = [name for name in golden("tiny_g2_qknorm").facts["shapes"] if not re.match(r"blocks\.[1-9]", name)]
SPEC_IS_READ_FROM = [
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    HEAD_NORM,
    QUERIES,
]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (LATENT_POSITIONS, HEAD_NORM)])
def test_a_missing_tensor_is_named(ema: Weights, tmp_path: Path, name: str) -> None:
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=f"missing {re.escape(name)}"):
        load_checkpoint(path, num_heads=3, tail_depth=2)


@pytest.mark.parametrize("name", [*SPEC_IS_READ_FROM, LATENT_POSITIONS, "final_layer.linear.bias"])
def test_a_tensor_with_an_axis_too_many_is_named(ema: Weights, tmp_path: Path, name: str) -> None:
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update({name: ema[name][None]}))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_checkpoint(path, num_heads=3, tail_depth=2)


@pytest.mark.parametrize("name", [*SPEC_IS_READ_FROM, LATENT_POSITIONS, "final_layer.linear.bias"])
def test_a_tensor_without_axes_is_named(ema: Weights, tmp_path: Path, name: str) -> None:
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update({name: torch.tensor(1.0)}))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_checkpoint(path, num_heads=3, tail_depth=2)


def test_a_mis_shaped_tensor_is_named_with_both_shapes(ema: Weights, tmp_path: Path) -> None:
    name = "blocks.3.mlp.fc2.weight"
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update({name: torch.ones(48, 5)}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(48, 5\), the model needs \(48, 192\)"):
        load_checkpoint(path, tail_depth=2)


@pytest.mark.parametrize("rows", [4, 15])
def test_too_few_latent_positions_are_refused(ema: Weights, tmp_path: Path, rows: int) -> None:
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update({LATENT_POSITIONS: torch.ones(rows, 48)}))
    with pytest.raises(CheckpointError, match=rf"{LATENT_POSITIONS} has shape \({rows}, 48\), .* needs \(16, 48\)"):
        load_checkpoint(path, tail_depth=2)


@pytest.mark.parametrize("name", ["blocks.0.attn.gate", "decoder.weight", "blocks.x"])
def test_a_tensor_the_model_does_not_have_is_named(ema: Weights, tmp_path: Path, name: str) -> None:
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError, match=f"unexpected {re.escape(name)}"):
        load_checkpoint(path, tail_depth=2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point_are_refused(ema: Weights, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "blocks.0.attn.qkv.weight"
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update({name: ema[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{name} holds {dtype}, not floating-point"):
        load_checkpoint(path, tail_depth=2)


def test_a_name_that_is_no_text_is_refused(ema: Weights, tmp_path: Path) -> None:
    path = save_edited(tmp_path / "a.pt", ema, lambda weights: weights.update({1: torch.ones(1)}))  # type: ignore[dict-item]
    with pytest.raises(CheckpointError):
        load_checkpoint(path, tail_depth=2)


# ---------------------------------------------------------------- files that are not checkpoints


@pytest.mark.parametrize("kept", [0, 1, 3, 10, 1000, 0.25, 0.5, 0.9, -1000, -100, -1])
def test_a_truncated_file_is_refused(qknorm: Golden, tmp_path: Path, kept: float) -> None:
    path = qknorm.save_pt(tmp_path / "a.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if 0 < kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"a\.pt: not a whole torch\.save zip file .*; download or save it again"):
        load_checkpoint(path, tail_depth=2)


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 100)
    with pytest.raises(CheckpointError, match=r"not a whole torch\.save zip file"):
        load_checkpoint(path)


def test_a_file_in_the_old_format_says_so(qknorm: Golden, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"ema": qknorm.ema}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"saved in the old format\).*save it again"):
        load_checkpoint(path, tail_depth=2)


def replace_contents(path: Path, pickled: bytes) -> None:
    """Put another table of contents into a released file."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, member in members.items():
            file.writestr(name, pickled if name.endswith("data.pkl") else member)


@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x80\x02.", id="nothing on the stack"),
        pytest.param(b"\x80\x02hc.", id="an object that was never stored"),
        pytest.param(b"\x80\x02K\x01Q.", id="a storage that is a number"),
        pytest.param(b"\x80\x02K\x01}b.", id="attributes for a number"),
        pytest.param(b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", id="arguments that do not fit"),
        pytest.param(b"\x80\x02}K\x01K\x02s.", id="a table without ema"),
    ],
)
def test_a_damaged_table_of_contents_is_refused(tmp_path: Path, pickled: bytes) -> None:
    torch.save({"ema": {"pos_embed": torch.ones(1)}}, tmp_path / "a.pt")
    replace_contents(tmp_path / "a.pt", pickled)
    with pytest.raises(CheckpointError, match=r"a\.pt: "):
        load_checkpoint(tmp_path / "a.pt", tail_depth=2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "holds a list, not a table"),
        (argparse.Namespace(ema=1), "holds a Namespace, not a table"),
        (torch.ones(3), "holds a Tensor, not a table"),
        ({"model": {"pos_embed": torch.ones(1)}}, "no `ema` weights in it; a released checkpoint has model, ema"),
        ({"ema": None}, "no `ema` weights"),
        ({"ema": {"pos_embed": [1.0]}}, "no `ema` weights"),
    ],
)
def test_a_file_without_ema_weights_is_refused(tmp_path: Path, content: object, problem: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(tmp_path / "a.pt")


UNUSUAL: dict[str, Callable[[Any], Any]] = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of the kinds themselves
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", ["pos_embed", "blocks.0.mlp.fc1.bias"])
def test_tensors_that_are_not_simply_numbers_are_refused(qknorm: Golden, tmp_path: Path, kind: str, name: str) -> None:
    weights = qknorm.ema | {name: UNUSUAL[kind](qknorm.ema[name])}
    path = qknorm.save_pt(tmp_path / "a.pt", ema=weights)
    with pytest.raises(CheckpointError, match=rf"a\.pt: {re.escape(name)} is a {kind}.* tensor; save dense ones: "):
        load_checkpoint(path, tail_depth=2)


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors", ".", "shipped:nothing"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = name if name.startswith("shipped:") else str(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"no checkpoint at {re.escape(str(path))}"):
        load_checkpoint(path)


# ---------------------------------------------------------------- files that would run code


class MakesFolder:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> MakesFolder:
    """A trap that has been seen to work."""
    trap = MakesFolder(tmp_path / "code_has_run")
    pickle.loads(pickle.dumps(trap))
    trap.folder.rmdir()
    return trap


def save_as_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def save_as_old_format(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [save_as_zip, save_as_old_format, save_as_pickle])
@pytest.mark.parametrize("place", ["ema", "args", "opt"])
def test_code_in_a_file_never_runs(
    qknorm: Golden, tmp_path: Path, trap: MakesFolder, save: Callable[[object, Path], None], place: str
) -> None:
    save({"ema": qknorm.ema, "args": namespace(encoder_depth=1), place: trap}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: (refused, because|not a whole)"):
        load_checkpoint(tmp_path / "a.pt", tail_depth=2)
    assert not trap.folder.exists()


class Renamed(argparse.Namespace):
    """Looks like the one class that is allowed."""


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (types.SimpleNamespace(encoder_depth=1), "types.SimpleNamespace"),
        (Renamed(encoder_depth=1), "Renamed"),
        (namespace(encoder_depth=1, clock=datetime.now(UTC)), "datetime"),
    ],
)
def test_an_object_of_another_class_is_refused_by_name(
    qknorm: Golden, tmp_path: Path, args: object, named: str
) -> None:
    path = qknorm.save_pt(tmp_path / "a.pt", args=args)
    told = rf"refused, because .*{named}.*only tensors, plain values and argparse.*torch\.save\(.*--num-heads N, --head"
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(path, tail_depth=2)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


SCALAR = np.float64(0).__reduce__()[0]


@pytest.mark.parametrize(
    "arguments",
    [
        (np.dtype("S2000000000"),),
        (np.dtype("f8"),),
        (np.dtype("S2000000"), b"x"),
        (np.dtype("S5000"), bytes(5000)),
        (np.dtype("V8"), bytes(8)),
        (8, bytes(8)),
        (),
    ],
    ids=str,
)
def test_values_of_numpy_that_are_no_numbers_are_refused(
    qknorm: Golden, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    """NumPy makes as many zeros as the type says where the file has none."""
    path = qknorm.save_pt(tmp_path / "a.pt", args={"encoder_depth": 1, "rate": Calls(SCALAR, *arguments)})
    with pytest.raises(CheckpointError, match=r"refused, because it holds something else.*; save it again where"):
        load_checkpoint(path, tail_depth=2)


def test_a_path_as_python_3_13_names_it_is_read(
    qknorm: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pathlib._local")
    module.PosixPath = PosixPath  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pathlib._local", module)
    monkeypatch.setattr(PosixPath, "__module__", "pathlib._local")
    path = qknorm.save_pt(tmp_path / "a.pt", args=namespace(encoder_depth=1, data=PosixPath("data")))
    assert b"pathlib._local" in path.read_bytes()
    assert load_checkpoint(path, tail_depth=2).spec


@pytest.mark.parametrize(
    "args",
    [
        {"encoder_depth": 1},
        namespace(encoder_depth=1, data=Path("data"), rate=np.float64(1e-4), name=np.str_("x"), flag=np.bool_(True)),
        namespace(encoder_depth=np.int64(1)),
        {"encoder_depth": np.int32(1), "model": None},
    ],
    ids=["a table", "paths and numbers of NumPy", "a depth of NumPy", "a table of NumPy"],
)
def test_args_of_other_programs_are_read(qknorm: Golden, tmp_path: Path, args: object) -> None:
    model = load_checkpoint(qknorm.save_pt(tmp_path / "a.pt", args=args), tail_depth=2)
    assert model.spec == load_checkpoint(qknorm.save_pt(tmp_path / "b.pt"), tail_depth=2).spec


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_models_are_unwrapped_and_said(
    qknorm: Golden, tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = {f"{prefix}{name}": tensor for name, tensor in qknorm.ema.items()}
    torch.save({"ema": wrapped, "args": namespace(encoder_depth=1)}, tmp_path / "a.pt")
    model = load_checkpoint(tmp_path / "a.pt", tail_depth=2).state_dict()
    assert re.search(r"left out (module\.|_orig_mod\.) before the names", caplog.text)
    plain = load_checkpoint(qknorm.save_pt(tmp_path / "b.pt"), tail_depth=2).state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in plain.items())


def test_a_wrapped_and_a_plain_model_in_one_are_refused(qknorm: Golden, tmp_path: Path) -> None:
    both = qknorm.ema | {f"module.{name}": tensor for name, tensor in qknorm.ema.items()}
    torch.save({"ema": both, "args": namespace(encoder_depth=1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds tensors twice.*save one of the two models"):
        load_checkpoint(tmp_path / "a.pt", tail_depth=2)


def test_a_refusal_does_not_advise_to_read_the_file_unsafely(qknorm: Golden, tmp_path: Path) -> None:
    path = qknorm.save_pt(tmp_path / "a.pt", args=types.SimpleNamespace(encoder_depth=1))
    with pytest.raises(CheckpointError, match="only tensors, plain values") as refusal:
        load_checkpoint(path, tail_depth=2)
    assert not re.search(r"trust|weights_only|\x1b|\n", str(refusal.value))


# ---------------------------------------------------------------- memory

MEASURE = """
import re, sys
from pathlib import Path
from elit_export.checkpoints.native import load_checkpoint

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

warm_up, path = sys.argv[1:]
load_checkpoint(warm_up, tail_depth=2)
before = kib("VmRSS")
model = load_checkpoint(path, num_heads=8, tail_depth=2)
sum(tensor.sum() for tensor in model.state_dict().values())  # touch every weight
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs the memory counters of Linux")
def test_reading_takes_hardly_more_memory_than_the_ema_weights(qknorm: Golden, tmp_path: Path) -> None:
    spec = tiny_spec(hidden_size=416, num_heads=8, head_depth=2, core_depth=8, tail_depth=2, mlp_ratio=4.0)
    with torch.device("meta"):
        shapes = {released_name(name, spec): tensor.shape for name, tensor in ElitSiT(spec).state_dict().items()}
    ema = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    ema_bytes = sum(tensor.nbytes for tensor in ema.values())
    path = tmp_path / "large.pt"
    others = {
        "model": {"all": torch.ones(ema_bytes // 4)},
        "opt": {"state": {0: {"exp_avg": torch.ones(ema_bytes // 4)}}},
    }
    torch.save(others | {"ema": ema, "args": namespace(encoder_depth=2)}, path)
    command = [sys.executable, "-c", MEASURE, str(qknorm.save_pt(tmp_path / "small.pt")), str(path)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    path.unlink()  # half a gigabyte
    assert run.returncode == 0, run.stderr
    assert ema_bytes > 150e6
    assert 1024 * int(run.stdout) <= 1.3 * ema_bytes
    assert 1024 * int(run.stdout) >= 0.9 * ema_bytes  # else nothing was measured


# ---------------------------------------------------------------- own format

FACTS = DataFacts(kind="pixels", low=0.0, high=2.0, class_names=("bag", "ankle boot", "été"))


@pytest.fixture
def model() -> ElitSiT:
    return with_facts(tiny_model(qk_norm=True))


def with_facts(model: ElitSiT) -> ElitSiT:
    model.data = FACTS
    return model


def test_own_format_returns_everything_bit_for_bit(tmp_path: Path, model: ElitSiT) -> None:
    save_checkpoint(tmp_path / "m.safetensors", model)
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert (again.spec, again.data, again.training) == (model.spec, FACTS, False)
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_numbers_of_each_channel_are_kept_and_held_against_the_model(tmp_path: Path) -> None:
    model = tiny_model(in_channels=2)
    model.data = DataFacts(kind="vae", scale=(0.5, 0.25), shift=(0.0, -1.0), vae="small")
    save_checkpoint(tmp_path / "m.safetensors", model)
    assert load_checkpoint(tmp_path / "m.safetensors").data == model.data
    model.data = DataFacts(kind="vae", scale=(0.5, 0.25, 1.0), vae="small")
    save_checkpoint(tmp_path / "m.safetensors", model)
    with pytest.raises(CheckpointError, match="metadata: data scale has 3 numbers, samples have 2 channels"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_a_released_model_survives_the_own_format(qknorm: Golden, tmp_path: Path) -> None:
    model = qknorm.load(tmp_path)
    save_checkpoint(tmp_path / "m.safetensors", model)
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert (again.spec, again.data) == (qknorm.spec, SD_VAE)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert (tmp_path / "m.safetensors").stat().st_size < 1.1 * sum(t.nbytes for t in model.state_dict().values()) + 2e4


def test_half_precision_storage_is_half_as_large_and_loads_as_float32(tmp_path: Path, model: ElitSiT) -> None:
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_checkpoint(whole, model)
    save_checkpoint(half, model, dtype=torch.float16)
    saved = whole.stat().st_size - half.stat().st_size
    assert saved == pytest.approx(sum(tensor.nbytes for tensor in model.state_dict().values()) / 2, abs=1000)
    again = load_checkpoint(half)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name


def test_saving_leaves_the_model_as_it_was(tmp_path: Path, model: ElitSiT) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path / "m.safetensors", model, dtype=torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def resave(path: Path, edit: Callable[[Weights, dict[str, str]], object]) -> Path:
    """The same file with other tensors or metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(weights, metadata)
    save_file(weights, path, metadata)
    return path


def spec_with(model: ElitSiT, **changes: object) -> str:
    return json.dumps(model.spec.to_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "elit_export/2"}, "its format is 'elit_export/2', this version reads 'elit_export/1'"),
        ({"spec": "{"}, "unreadable metadata"),
        ({"spec": "null"}, "unreadable metadata"),
        ({"spec": '{"num_heads": 2}'}, "missing core_depth"),
        ({"data": "[1]"}, "unreadable metadata"),
        ({"data": '{"kind": "pixels", "colour": 1}'}, "colour"),
        ({"data": '{"kind": "pixels", "low": "0"}'}, "data low '0' is not a finite number"),
        ({"data": '{"kind": "pixels", "class_names": [1, 2]}'}, "class_names .* are not a list of texts"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, model: ElitSiT, changes: dict[str, str], problem: str
) -> None:
    save_checkpoint(tmp_path / "m.safetensors", model)
    path = resave(tmp_path / "m.safetensors", lambda _, metadata: metadata.update(changes))
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "changes", [{"num_heads": 3}, {"hidden_size": "16"}, {"hidden_size": 16.0}, {"group_size": 2.0}, {"depth": 4}]
)
def test_a_spec_that_makes_no_model_is_refused(tmp_path: Path, model: ElitSiT, changes: dict[str, object]) -> None:
    save_checkpoint(tmp_path / "m.safetensors", model)
    path = resave(tmp_path / "m.safetensors", lambda _, metadata: metadata.update(spec=spec_with(model, **changes)))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["format", "spec", "data"])
def test_missing_metadata_is_named(tmp_path: Path, model: ElitSiT, name: str) -> None:
    save_checkpoint(tmp_path / "m.safetensors", model)
    path = resave(tmp_path / "m.safetensors", lambda _, metadata: metadata.pop(name))
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"its format is None, this version reads '{FORMAT}'"):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda weights: weights.pop("read.query"), "missing read.query"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected extra"),
        (
            lambda weights: weights.update({"read.query": torch.ones(4, 8)}),
            r"read.query has shape \(4, 8\), .*\(4, 32\)",
        ),
        (lambda weights: weights.update({"read.query": torch.ones(4, 32).int()}), "read.query holds torch.int32"),
    ],
)
def test_tensors_that_do_not_fit_the_spec_are_named(
    tmp_path: Path, model: ElitSiT, edit: Callable[[Weights], object], problem: str
) -> None:
    save_checkpoint(tmp_path / "m.safetensors", model)
    path = resave(tmp_path / "m.safetensors", lambda weights, _: edit(weights))
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(path)


@pytest.mark.parametrize("asked", [{"num_heads": 4}, {"head_depth": 2}, {"tail_depth": 0}])
def test_own_format_refuses_numbers_that_contradict_it(tmp_path: Path, model: ElitSiT, asked: dict[str, int]) -> None:
    save_checkpoint(tmp_path / "m.safetensors", model)
    name = next(iter(asked))
    told = getattr(model.spec, name)
    with pytest.raises(CheckpointError, match=f"{name}={asked[name]} was asked for, but the file says {told}"):
        load_checkpoint(tmp_path / "m.safetensors", **asked)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, model: ElitSiT, kept: float) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if 0 < kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"m\.safetensors: not a whole safetensors file"):
        load_checkpoint(path)


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, model: ElitSiT, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model)
    before = path.read_bytes()

    def broken(_: Weights, temporary: Path, __: dict[str, str]) -> None:
        temporary.write_bytes(before[:100])
        raise error

    monkeypatch.setattr("elit_export.checkpoints.weights.save_file", broken)
    with pytest.raises(type(error)):
        save_checkpoint(path, tiny_model())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_makes_the_folder_and_replaces_the_old_file(tmp_path: Path, model: ElitSiT) -> None:
    path = tmp_path / "deep" / "folder" / "m.safetensors"
    save_checkpoint(path, model)
    save_checkpoint(path, tiny_model())
    assert load_checkpoint(path).spec == tiny_spec()
    assert list(path.parent.iterdir()) == [path]
