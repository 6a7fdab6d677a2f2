"""Folders of diffusers: what is read of them, and what is wrong with those that are not."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from elit_export.checkpoints.vae import KINDS, WEIGHTS, read_decoder
from elit_export.checkpoints.vae_decoder import check_installed, load_decoder
from elit_export.errors import BackendUnavailable, CheckpointError, RecipeError
from elit_export.spec import PIXELS, SD_VAE, DataFacts
from tests.helpers import tiny_spec
from tests.vae import LATENTS, MAKERS, MEANS, STDS, load_vae, pixels_of, save_vae

Z = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 16, 6, 6)).astype(np.float32))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each. Do not change them: copy them first."""
    base = tmp_path_factory.mktemp("decoders")
    return {name: save_vae(name, base / name) for name in MAKERS}


@pytest.fixture
def qwen8(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["qwen8"], tmp_path / "qwen8"))


@pytest.fixture
def kl4(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["kl4"], tmp_path / "kl4"))


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("kl4", ("AutoencoderKL", 4, 3, (0.18215,) * 4, (0.0,) * 4, 2)),
        ("kl16", ("AutoencoderKL", 16, 3, (0.3611,) * 16, (0.1159,) * 16, 2)),
        ("tiny4", ("AutoencoderTiny", 4, 3, (1.0,) * 4, (0.0,) * 4, 4)),
        ("tiny16", ("AutoencoderTiny", 16, 3, (1.0,) * 16, (0.0,) * 16, 4)),
        ("qwen8", ("AutoencoderKLQwenImage", 8, 3, tuple(1 / std for std in STDS), MEANS, 2)),
    ],
)
def test_a_folder_says_how_to_feed_it(folders: dict[str, Path], name: str, facts: tuple[Any, ...]) -> None:
    found = read_decoder(folders[name])
    assert (found.class_name, *vars(found.vae).values()) == facts


@pytest.mark.parametrize("name", MAKERS)
def test_the_module_says_what_diffusers_says(folders: dict[str, Path], name: str) -> None:
    folder = read_decoder(folders[name])
    z = Z[:, : folder.vae.channels]
    found, expected = load_decoder(folder)(z), pixels_of(load_vae(folders[name]), z)
    assert torch.equal(found, expected)
    assert expected.std() > 0.1  # no dead decoder


def test_the_vae_of_a_pipeline_is_found(kl4: Path, tmp_path: Path) -> None:
    shutil.copytree(kl4, tmp_path / "pipeline" / "vae")
    assert read_decoder(tmp_path / "pipeline").path == tmp_path / "pipeline" / "vae"
    assert read_decoder(tmp_path / "pipeline").sha256 == read_decoder(kl4).sha256


@pytest.mark.parametrize("name", KINDS)
def test_what_a_configuration_leaves_out_is_what_diffusers_takes(name: str) -> None:
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    for key, value in KINDS[name].defaults.items():
        default = parameters[key].default
        assert (list(default) if isinstance(default, tuple) else default) == value


def test_old_configurations_are_read(kl4: Path) -> None:
    change_config(kl4, lambda config: [config.pop(key) for key in ("scaling_factor", "shift_factor", "latents_mean")])
    assert (read_decoder(kl4).vae.scale, read_decoder(kl4).vae.shift) == ((0.18215,) * 4, (0.0,) * 4)


def test_old_names_of_attention_weights_are_read(kl4: Path) -> None:
    """The SD-VAE is published with these."""
    expected = load_decoder(read_decoder(kl4))(Z[:, :4])
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(key: str) -> str:
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    assert change_weights(kl4, lambda weights: {renamed(key): tensor for key, tensor in weights.items()}) > 0
    assert torch.equal(load_decoder(read_decoder(kl4))(Z[:, :4]), expected)


def test_half_precision_weights_become_float32(kl4: Path) -> None:
    change_weights(kl4, lambda weights: {key: tensor.half() for key, tensor in weights.items()})
    decoder = load_decoder(read_decoder(kl4))
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}


def test_the_hash_follows_configuration_and_weights(kl4: Path) -> None:
    before = read_decoder(kl4).sha256
    change_config(kl4, lambda config: config.update(scaling_factor=0.5))
    assert read_decoder(kl4).sha256 != before
    between = read_decoder(kl4).sha256
    change_weights(kl4, lambda weights: {key: tensor + 1e-3 for key, tensor in weights.items()})
    assert read_decoder(kl4).sha256 != between


def test_reading_needs_neither_diffusers_nor_torch(kl4: Path) -> None:
    script = "import sys; from elit_export.checkpoints.vae import read_decoder; read_decoder(sys.argv[1]).sha256"
    script += "; sys.exit('diffusers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script, str(kl4)], check=False).returncode == 0


# ---------------------------------------------------------------- what is wrong with one


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> int:
    """How many names are new."""
    before = load_file(folder / WEIGHTS)
    after = change(dict(before))
    save_file({key: tensor.contiguous() for key, tensor in after.items()}, folder / WEIGHTS)
    return len(set(after) - set(before))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no decoder at .*nowhere; give a folder that diffusers saved"):
        read_decoder(tmp_path / "nowhere")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json in it or in its `vae`"):
        read_decoder(tmp_path)


@pytest.mark.parametrize(("content", "told"), [("{", "not JSON"), ("[1]", "no table"), ("\udcff", "not JSON")])
def test_a_damaged_configuration_is_refused(kl4: Path, content: str, told: str) -> None:
    (kl4 / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"config\.json: {told}.*copy the folder again"):
        read_decoder(kl4)


@pytest.mark.parametrize("name", ["VQModel", "AutoencoderKLWan", None, 3, ["AutoencoderKL"]])
def test_another_class_is_refused_before_diffusers_is_asked(kl4: Path, name: object) -> None:
    change_config(kl4, lambda config: config.update(_class_name=name))
    with pytest.raises(CheckpointError, match=r"its class is .*; known: AutoencoderKL, AutoencoderTiny"):
        read_decoder(kl4)


def test_a_folder_without_weights_is_refused(kl4: Path) -> None:
    (kl4 / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no weights, diffusion_pytorch_model\.safetensors is missing; save it"):
        read_decoder(kl4)


def test_pickled_weights_are_refused_with_the_reason(kl4: Path) -> None:
    (kl4 / WEIGHTS).rename(kl4 / "diffusion_pytorch_model.bin")
    told = r"\(it has diffusion_pytorch_model\.bin\); save it again.*pickled weights are not read, as they can run any"
    with pytest.raises(CheckpointError, match=told):
        read_decoder(kl4)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("scaling_factor", float("nan"), "scaling_factor is nan, must be a finite number"),
        ("scaling_factor", float("inf"), "scaling_factor is inf, must be a finite number"),
        ("scaling_factor", 10**400, "not JSON: a whole number of more than 128 bits"),
        ("scaling_factor", None, "scaling_factor is None, must be a finite number"),
        ("scaling_factor", 0, "scaling_factor is 0, must be positive; correct it: latents are divided by it"),
        (
            "scaling_factor",
            -0.18215,
            "scaling_factor is -0.18215, must be positive; correct it: latents are divided by it",
        ),
        ("shift_factor", "0.1", "shift_factor is '0.1', must be a finite number"),
        ("latent_channels", True, "latent_channels is True, must be a whole number"),
        ("latent_channels", 0, "latent_channels is 0, must be a whole number of at least 1"),
        ("out_channels", 4, "out_channels is 4: images have 1 or 3 channels"),
        ("block_out_channels", [8] * 20, "the number of pixels along a latent is 524,288, at most 64"),
        ("block_out_channels", [], r"block_out_channels is \[\], must be a list"),
        ("latents_mean", [0.0] * 4, "latents_mean is given: of this class only latents of one scaling_factor"),
        ("latents_std", [1.0] * 4, "latents_std is given"),
    ],
)
def test_numbers_that_cannot_be_are_named(kl4: Path, key: str, value: object, told: str) -> None:
    change_config(kl4, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {told}"):
        read_decoder(kl4)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("z_dim", 0, "z_dim is 0, must be a whole number of at least 1"),
        ("input_channels", 4, "input_channels is 4: images have 1 or 3 channels"),
        ("dim_mult", [], r"dim_mult is \[\], must be a list"),
        ("dim_mult", [1, 2, 4], r"temperal_downsample is \[True\], must be a list of 2 values: dim_mult has 3 stages"),
        ("temperal_downsample", True, "temperal_downsample is True, must be a list of 1 values"),
        ("latents_mean", None, "latents_mean is None, must be a list of 8 finite numbers, one for each channel"),
        ("latents_mean", [0.0] * 7, r"latents_mean is \[.*\], must be a list of 8 finite numbers"),
        ("latents_mean", [*MEANS[:7], float("nan")], r"latents_mean is \[.*nan\], must be a list of 8 finite"),
        ("latents_std", 1.0, "latents_std is 1.0, must be a list of 8 finite numbers"),
        ("latents_std", [*STDS[:7], "2"], r"latents_std is \[.*'2'\], must be a list of 8 finite numbers"),
        ("latents_std", [*STDS[:7], True], r"latents_std is \[.*True\], must be a list of 8 finite numbers"),
        ("latents_std", [*STDS[:7], 0], r"latents_std is \[.* 0\], must be positive numbers; latents are multiplied"),
        ("latents_std", [*STDS[:7], -1.0], r"latents_std is \[.* -1.0\], must be positive numbers"),
        ("latents_std", [*STDS[:7], 5e-324], r"latents_std is \[.*5e-324\], must be positive numbers"),
    ],
)
def test_numbers_of_channels_that_cannot_be_are_named(qwen8: Path, key: str, value: object, told: str) -> None:
    change_config(qwen8, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {told}"):
        read_decoder(qwen8)


def test_numbers_left_out_are_those_of_sixteen_channels(qwen8: Path) -> None:
    change_config(qwen8, lambda config: [config.pop(key) for key in ("latents_mean", "latents_std")])
    with pytest.raises(CheckpointError, match=r"latents_std is \[2\.8184, .*\], must be a list of 8 finite numbers"):
        read_decoder(qwen8)
    change_config(qwen8, lambda config: config.pop("z_dim"))
    found = read_decoder(qwen8)
    assert (found.vae.channels, found.vae.scale[-1], found.vae.shift[-1]) == (16, 1 / 1.916, -0.2921)


KEY = "decoder.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: {k: v for k, v in weights.items() if k != KEY}, f"does not fit config.json: missing {KEY}"),
        (lambda weights: weights | {"decoder.more": torch.ones(2)}, r"does not fit config.json: unknown decoder\.more"),
        (lambda weights: weights | {KEY: torch.ones(3, 3)}, f"diffusers cannot read it: .*size mismatch for {KEY}"),
        (lambda weights: weights | {KEY: weights[KEY] * torch.nan}, "its weights give pixels that are not finite"),
        (
            lambda weights: {k: v for k, v in weights.items() if "decoder." not in k},
            r"missing decoder\..* and \d+ more",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(kl4: Path, change: Any, told: str) -> None:
    change_weights(kl4, change)
    with pytest.raises(CheckpointError, match=told):
        load_decoder(read_decoder(kl4))


def test_an_encoder_is_not_needed(kl4: Path) -> None:
    expected = load_decoder(read_decoder(kl4))(Z[:, :4])
    change_weights(kl4, lambda weights: {k: v for k, v in weights.items() if not k.startswith(("encoder.", "quant_"))})
    assert torch.equal(load_decoder(read_decoder(kl4))(Z[:, :4]), expected)


@pytest.mark.parametrize("content", [b"", b"123456789" * 20])
def test_damaged_weights_are_refused(kl4: Path, content: bytes) -> None:
    (kl4 / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"kl4: diffusers cannot read it: .*; copy the folder again"):
        load_decoder(read_decoder(kl4))


def test_a_configuration_far_larger_than_its_weights_is_refused_unbuilt(kl4: Path) -> None:
    change_config(kl4, lambda config: config.update({"block_out_channels": [16384] * 2, "layers_per_block": 8}))
    told = r"diffusion_pytorch_model\.safetensors has [\d,]+ numbers, the decoder of config\.json [\d,]{14,}; copy the"
    with pytest.raises(CheckpointError, match=told):
        load_decoder(read_decoder(kl4))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=["Python", "torch"]
)
def test_too_little_memory_is_told_apart_from_damage(
    kl4: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import diffusers

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", fail)
    with pytest.raises(BackendUnavailable, match=r"kl4: not enough memory \(.*\); build on a machine with more memory"):
        load_decoder(read_decoder(kl4))


def test_cut_weights_are_refused(kl4: Path) -> None:
    (kl4 / WEIGHTS).write_bytes((kl4 / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"kl4: diffusers cannot read it: .*; copy the folder again"):
        load_decoder(read_decoder(kl4))


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "nonsense"},
        {"block_out_channels": [8, 16, 16]},
        {"norm_num_groups": 7},
        {"up_block_types": ["X", "Y"]},
    ],
)
def test_a_configuration_of_no_model_is_refused(kl4: Path, change: dict[str, Any]) -> None:
    change_config(kl4, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=r"kl4: .*copy the folder again"):
        load_decoder(read_decoder(kl4))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm_num_groups": 0}, "ZeroDivisionError: "),
        ({"block_out_channels": [8, 0]}, "ZeroDivisionError: "),
        ({"act_fn": 3}, "AttributeError: 'int' object has no attribute 'lower'"),
        ({"act_fn": None}, "AttributeError: 'NoneType' object has no attribute 'lower'"),
        ({"norm_num_groups": True}, "TypeError: "),  # found at the first call
    ],
)
def test_what_the_constructor_raises_is_told_with_the_file(kl4: Path, change: dict[str, Any], told: str) -> None:
    change_config(kl4, lambda config: config.update(change))
    with pytest.raises(
        CheckpointError, match=rf"config\.json: diffusers cannot make AutoencoderKL of it: {told}.*copy"
    ):
        load_decoder(read_decoder(kl4))


def test_another_number_of_channels_than_the_model_is_refused(folders: dict[str, Path]) -> None:
    told = r"kl16 decodes latents of 16 channels, the model makes 4; give the folder of the VAE that the model"
    with pytest.raises(RecipeError, match=told):
        read_decoder(folders["kl16"]).check_fits(tiny_spec(in_channels=4), SD_VAE)
    read_decoder(folders["kl4"]).check_fits(tiny_spec(in_channels=4), SD_VAE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scaling_factor": 0.13025}, r"has the scale 0\.13025, the latents of this model \(.*ema\) have 0\.18215"),
        ({"shift_factor": 0.25}, r"has the shift 0\.25, the latents of this model \(.*ema\) have 0"),
    ],
)
def test_another_scale_than_the_model_is_refused(kl4: Path, change: dict[str, Any], told: str) -> None:
    """It would decode, into wrong pictures."""
    change_config(kl4, lambda config: config.update(change))
    folder, spec = read_decoder(kl4), tiny_spec(in_channels=4)
    with pytest.raises(RecipeError, match=rf"kl4 {told}; give the folder of the VAE .* set `model\.data`"):
        folder.check_fits(spec, SD_VAE)
    for nobody_said in ("unknown", ""):
        folder.check_fits(spec, DataFacts(kind="vae", vae=nobody_said))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("latents_std", r"has the scale \[0\.35.*\], the latents of this model \(small\) have \[0\.35.*\]"),
        ("latents_mean", r"has the shift \[-0\.75.*\], the latents of this model \(small\) have \[-0\.75.*\]"),
    ],
)
def test_another_scale_of_one_channel_is_refused(qwen8: Path, key: str, told: str) -> None:
    spec = tiny_spec(in_channels=8)
    read_decoder(qwen8).check_fits(spec, LATENTS[8])
    change_config(qwen8, lambda config: config[key].__setitem__(5, 1.5))
    with pytest.raises(RecipeError, match=rf"qwen8 {told}; give the folder of the VAE .* set `model\.data`"):
        read_decoder(qwen8).check_fits(spec, LATENTS[8])
    read_decoder(qwen8).check_fits(spec, DataFacts(kind="vae", vae="unknown"))


def test_one_number_of_a_model_is_that_of_every_channel(qwen8: Path) -> None:
    spec, facts = tiny_spec(in_channels=8), DataFacts(kind="vae", scale=0.5, shift=0.25, vae="small")
    with pytest.raises(RecipeError, match=r"has the scale \[.*\], the latents of this model \(small\) have 0\.5;"):
        read_decoder(qwen8).check_fits(spec, facts)
    change_config(qwen8, lambda config: config.update(latents_std=[2.0] * 8, latents_mean=[0.25] * 8))
    read_decoder(qwen8).check_fits(spec, facts)


def test_a_tiny_decoder_has_a_scale_of_its_own(folders: dict[str, Path]) -> None:
    read_decoder(folders["tiny4"]).check_fits(tiny_spec(in_channels=4), SD_VAE)


def test_a_model_of_pixels_needs_none(folders: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"makes pixels itself; leave \[decoder\] out of the recipe"):
        read_decoder(folders["kl4"]).check_fits(tiny_spec(), PIXELS)


def test_the_extra_is_named_where_diffusers_is_missing(kl4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for needs in (check_installed, lambda: load_decoder(read_decoder(kl4))):
        with pytest.raises(BackendUnavailable, match=r"needs diffusers; pip install -e '.*\[diffusers\]'"):
            needs()
