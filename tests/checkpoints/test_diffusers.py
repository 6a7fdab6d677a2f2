"""Reading a transformer folder of diffusers with a file of Read and Write, and what is refused."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elit_export.checkpoints.diffusers import (
    CONFIG,
    DEFAULTS,
    INDEX,
    OPTIONS,
    config_of,
    diffusers_name,
    save_interface,
)
from elit_export.checkpoints.native import checkpoint_sha256, load_checkpoint, save_checkpoint, stored_checkpoint
from elit_export.errors import CheckpointError
from elit_export.models.mmdit import ElitMMDiT
from elit_export.models.registry import named_spec
from elit_export.spec import STEP, DataFacts
from tests.helpers import tiny_model, weights_by_name
from tests.text_models import inputs_of, saved_base, text_model, text_spec

WEIGHTS = "diffusion_pytorch_model.safetensors"


def written_base(model: ElitMMDiT, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder that diffusers would write for a model's own weights, written without it."""
    folder.mkdir(parents=True)
    weights = {
        diffusers_name(name, model.spec): tensor.clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith(("read.", "write."))
    }
    for name in ("norm_out.linear.weight", "norm_out.linear.bias"):
        weights[name] = torch.cat(weights[name].chunk(2)[::-1])
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / WEIGHTS)
    config = {"_class_name": "QwenImageTransformer2DModel", **config_of(model.spec), "guidance_embeds": False}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written_base(text_model(), tmp_path / "base")


@pytest.fixture
def interface(tmp_path: Path) -> Path:
    save_interface(tmp_path / "interface.safetensors", text_model())
    return tmp_path / "interface.safetensors"


def assert_equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    theirs = expected.state_dict()
    assert set(found.state_dict()) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.state_dict().items())


# ---------------------------------------------------------------- what is read


def test_folder_and_file_make_the_model_bit_for_bit(base: Path, interface: Path) -> None:
    model = load_checkpoint(base, interface=interface)
    assert model.spec == text_spec()
    assert not model.training
    assert_equal(model, text_model())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}])
def test_what_diffusers_writes_is_read_whole_or_in_shards(
    tmp_path: Path, interface: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("diffusers")
    folder = saved_base(text_spec(), tmp_path / "saved", **options)
    assert (folder / INDEX).is_file() == bool(options)
    if not options:
        published = load_file(folder / WEIGHTS)
        model = load_checkpoint(folder, interface=interface)
        own = {
            diffusers_name(name, model.spec) for name in model.state_dict() if not name.startswith(("read", "write"))
        }
        assert own == set(published)
        return
    shards = load_checkpoint(folder, interface=interface)
    (folder / INDEX).unlink()  # the same without an index
    assert_equal(load_checkpoint(folder, interface=interface), shards)
    assert_equal(shards, load_checkpoint(saved_base(text_spec(), tmp_path / "whole"), interface=interface))


def test_a_pipeline_is_read_at_its_transformer(tmp_path: Path, interface: Path) -> None:
    written_base(text_model(), tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert_equal(load_checkpoint(tmp_path / "pipeline", interface=interface), text_model())


def test_half_precision_weights_are_read_as_float32(tmp_path: Path, interface: Path) -> None:
    folder = written_base(text_model(), tmp_path / "half", torch.bfloat16)
    model = load_checkpoint(folder, interface=interface)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(model.state_dict(), text_model().state_dict(), rtol=0.01, atol=0.01)


def test_data_facts_come_from_the_file_of_read_and_write(tmp_path: Path, base: Path) -> None:
    facts = DataFacts(kind="vae", scale=0.5, vae="some/vae")
    save_interface(tmp_path / "i.safetensors", ElitMMDiT(text_spec(), facts))
    assert load_checkpoint(base, interface=tmp_path / "i.safetensors").data == facts


def test_the_file_holds_read_and_write_alone_and_may_be_half(tmp_path: Path, interface: Path, base: Path) -> None:
    model = text_model()
    names = {name for name in model.state_dict() if name.startswith(("read.", "write."))}
    assert set(load_file(interface)) == names
    save_interface(tmp_path / "half.safetensors", model, dtype=torch.float16)
    loaded = load_checkpoint(base, interface=tmp_path / "half.safetensors").state_dict()
    assert all(torch.equal(loaded[name], model.state_dict()[name].half().float()) for name in names)


@torch.inference_mode()
def test_a_whole_model_survives_the_own_format(tmp_path: Path) -> None:
    model = text_model()
    save_checkpoint(tmp_path / "whole.safetensors", model)
    loaded = load_checkpoint(tmp_path / "whole.safetensors")
    assert_equal(loaded, model)
    inputs = inputs_of(model.spec, STEP, rows=2, text=3, kept=4)
    assert torch.equal(loaded(*inputs.values()), model(*inputs.values()))


MEMORY = """
import re, sys
from pathlib import Path
from elit_export.checkpoints.native import load_checkpoint

def kib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, interface = sys.argv[1:]
load_checkpoint(folder, interface=interface)
before = kib()
model = load_checkpoint(folder, interface=interface)
total = sum(float(parameter.sum()) for parameter in model.parameters())  # every page is read
print((kib() - before) * 1024, sum(tensor.numel() * 4 for tensor in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_float32_weights_stay_on_their_files(tmp_path: Path) -> None:
    model = ElitMMDiT(text_spec(hidden_size=256, num_heads=8))
    model.load_state_dict(weights_by_name({n: tuple(t.shape) for n, t in model.state_dict().items()}, seed=1))
    folder = written_base(model, tmp_path / "base")
    save_interface(tmp_path / "i.safetensors", model)
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "i.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 40e6
    assert grown < 0.2 * size


# ---------------------------------------------------------------- what is refused


def edited_config(base: Path, **changes: Any) -> None:
    config = json.loads((base / CONFIG).read_text())
    (base / CONFIG).write_text(json.dumps(config | changes))


def edited_weights(base: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(base / WEIGHTS)
    edit(weights)
    save_file(weights, base / WEIGHTS)


def refused(base: Path, interface: Path | None, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(base, interface=interface)


def test_a_folder_of_another_class_is_refused(base: Path, interface: Path) -> None:
    edited_config(base, _class_name="FluxTransformer2DModel")
    refused(base, interface, "is a FluxTransformer2DModel, not a QwenImageTransformer2DModel")


@pytest.mark.parametrize("option", OPTIONS)
def test_a_variant_of_the_class_is_refused(base: Path, interface: Path, option: str) -> None:
    edited_config(base, **{option: True})
    refused(base, interface, f"sets {option}, which ELIT-MM-DiT does not have")


def test_a_folder_without_weights_is_refused(base: Path, interface: Path) -> None:
    (base / WEIGHTS).rename(base / "diffusion_pytorch_model.bin")
    refused(
        base, interface, r"no weights in safetensors files \(in other formats: diffusion_pytorch_model.bin\); download"
    )


def test_a_folder_of_something_else_is_refused(tmp_path: Path, interface: Path) -> None:
    refused(tmp_path, interface, "no config.json in it or in its `transformer`; give the folder of a Qwen")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 128}, "of width 128: attention_head_dim is 32, they need 64"),
        ({"hidden_size": 128, "num_heads": 4}, "of width 128: num_attention_heads is 2, they need 4; give the file"),
        ({"core_depth": 3}, "num_layers is 4, they need 5"),
        ({"text_width": 16}, "joint_attention_dim is 24, they need 16"),
        ({"in_channels": 3}, "in_channels is 16, they need 12; out_channels is 4, they need 3"),
    ],
)
def test_read_and_write_of_another_model_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    save_interface(tmp_path / "other.safetensors", ElitMMDiT(text_spec(**changes)))
    refused(base, tmp_path / "other.safetensors", told)


def test_another_split_of_the_same_blocks_is_that_of_the_file(tmp_path: Path, base: Path) -> None:
    save_interface(tmp_path / "i.safetensors", text_model(head_depth=2, core_depth=1))
    model = load_checkpoint(base, interface=tmp_path / "i.safetensors")
    assert [len(part) for part in (model.head, model.core, model.tail)] == [2, 1, 1]
    theirs = text_model()
    assert torch.equal(model.head[1].image.attn.q.weight, theirs.core[0].image.attn.q.weight)
    with pytest.raises(CheckpointError, match="head_depth=1 was asked for, but the file says 2"):
        load_checkpoint(base, interface=tmp_path / "i.safetensors", head_depth=1)


def test_read_and_write_of_another_backbone_are_refused(base: Path, tmp_path: Path) -> None:
    save_interface(tmp_path / "sit.safetensors", tiny_model())
    refused(
        base,
        tmp_path / "sit.safetensors",
        "Read and Write of ELIT-SiT; a QwenImageTransformer2DModel takes those of ELIT-MM-DiT",
    )


def test_tensors_of_another_width_are_named(base: Path, interface: Path) -> None:
    spec = text_spec(hidden_size=128, num_heads=4)
    facts = {"format": "elit_export interface/1", "spec": json.dumps(text_spec().to_dict()), "data": '{"kind": "vae"}'}
    save_file({"read.query": torch.ones(16, spec.hidden_size)}, interface, facts)
    refused(base, interface, r"missing read.pos_embed")
    save_interface(interface, ElitMMDiT(spec))
    save_file(load_file(interface), interface, facts)
    refused(base, interface, r"read.query has shape \(16, 128\), the model needs \(16, 64\)")


def test_a_whole_model_is_no_file_of_read_and_write(base: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "whole.safetensors", text_model())
    refused(
        base,
        tmp_path / "whole.safetensors",
        "its format is 'elit_export/1', this version reads 'elit_export interface/1'",
    )


def test_a_folder_alone_and_a_file_too_many_are_refused(base: Path, interface: Path, tmp_path: Path) -> None:
    refused(
        base,
        None,
        r'no Read and Write; give the file that does, .*: `interface = "FILE"` in the recipe, or --interface FILE',
    )
    refused(base, tmp_path / "nowhere", "no file with Read and Write at")
    save_checkpoint(tmp_path / "whole.safetensors", text_model())
    refused(tmp_path / "whole.safetensors", interface, "a file holds its Read and Write; leave `interface`")


def test_tensors_that_do_not_fit_are_named_as_published(base: Path, interface: Path) -> None:
    edited_weights(base, lambda weights: weights.pop("transformer_blocks.2.attn.add_k_proj.weight"))
    refused(base, interface, "missing transformer_blocks.2.attn.add_k_proj.weight")
    edited_weights(base, lambda weights: weights.update(lora=torch.ones(1)))
    refused(base, interface, "unexpected lora")


def test_weights_in_one_byte_are_refused(base: Path, interface: Path) -> None:
    packed = torch.ones(64, dtype=torch.float8_e4m3fn)
    edited_weights(base, lambda weights: weights.update({"img_in.bias": packed}))
    refused(base, interface, "img_in.bias holds torch.float8_e4m3fn, not floating-point numbers of 2 bytes or more")


def test_what_a_config_leaves_out_is_what_diffusers_takes(base: Path, interface: Path) -> None:
    config = json.loads((base / CONFIG).read_text())
    assert config.pop("patch_size") == 2
    (base / CONFIG).write_text(json.dumps(config))
    assert load_checkpoint(base, interface=interface).spec == text_spec()
    pytest.importorskip("diffusers")
    from diffusers import QwenImageTransformer2DModel

    known = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
    for name, value in DEFAULTS.items():
        assert known[name].default == (tuple(value) if isinstance(value, list) else value)


def test_a_tensor_in_two_files_is_refused(base: Path, interface: Path) -> None:
    shutil.copy(base / WEIGHTS, base / "diffusion_pytorch_model.fp16.safetensors")
    refused(base, interface, "is in diffusion_pytorch_model.safetensors and in another file; keep one variant")


def test_damaged_files_are_named(base: Path, interface: Path) -> None:
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "../lost.safetensors"}}))
    refused(base, interface, "which is not a safetensors file of its own folder")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "lost.safetensors"}}))
    refused(base, interface, "lacks lost.safetensors, which its index names; copy")
    (base / INDEX).write_text("{}")
    refused(base, interface, f"{re.escape(INDEX)}: has no weight_map")
    (base / INDEX).unlink()
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-8])
    refused(base, interface, f"{re.escape(WEIGHTS)}: not a whole safetensors file")
    for content in ("{", "[]", '"' + "[" * 100_000):
        (base / CONFIG).write_text(content)
        refused(base, interface, r"config.json: (not JSON|no table of names)")


def test_the_published_model_has_the_published_config() -> None:
    assert config_of(named_spec("ELIT-Qwen-Image", resolution=1024)) == {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 60,
        "joint_attention_dim": 3584,
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "axes_dims_rope": [16, 56, 56],
    }


# ---------------------------------------------------------------- weights as stored, and the hash of all that is read


def test_weights_stay_as_they_are_stored_until_they_are_upcast(tmp_path: Path) -> None:
    folder = written_base(text_model(), tmp_path / "half", torch.bfloat16)
    save_interface(tmp_path / "i.safetensors", text_model(), dtype=torch.float16)
    stored = stored_checkpoint(folder, interface=tmp_path / "i.safetensors")
    kinds = {name.startswith(("read.", "write.")): tensor.dtype for name, tensor in stored.state_dict().items()}
    assert kinds == {True: torch.float16, False: torch.bfloat16}
    assert_equal(load_checkpoint(folder, interface=tmp_path / "i.safetensors"), stored.float())


def test_the_hash_is_of_config_every_shard_and_the_interface(base: Path, interface: Path, tmp_path: Path) -> None:
    (base / WEIGHTS).rename(base / "first.safetensors")
    edited = load_file(base / "first.safetensors")
    save_file({"img_in.bias": edited.pop("img_in.bias")}, base / "second.safetensors")
    save_file(edited, base / "first.safetensors")
    whole = checkpoint_sha256(base, interface)
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere" / "transformer"))
    renamed = Path(shutil.copy(interface, tmp_path / "renamed.safetensors"))
    (moved / "README.md").write_text("not read")
    assert checkpoint_sha256(moved.parent, renamed) == whole  # as the transformer of a pipeline
    for file in (moved / CONFIG, moved / "first.safetensors", moved / "second.safetensors", renamed):
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert checkpoint_sha256(moved, renamed) != whole, file.name
        file.write_bytes(content)
    assert checkpoint_sha256(moved, renamed) == whole


def test_the_hash_of_a_file_is_its_own(interface: Path) -> None:
    assert checkpoint_sha256(interface) == hashlib.sha256(interface.read_bytes()).hexdigest()


def test_a_hash_wants_all_files(base: Path, interface: Path) -> None:
    with pytest.raises(CheckpointError, match=r'`interface = "FILE"` in the recipe, or --interface FILE'):
        checkpoint_sha256(base)
    (base / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no weights in safetensors files"):
        checkpoint_sha256(base, interface)
