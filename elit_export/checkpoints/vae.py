"""The configuration of a VAE that diffusers saved, read and checked without diffusers.

A class of diffusers is known if it has a row in KINDS.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elit_export.bundle.atomic import sha256_of
from elit_export.bundle.readers import read_json_object
from elit_export.checkpoints.hf_folder import CONFIG, check_numbers, part_folder
from elit_export.errors import CheckpointError, RecipeError
from elit_export.spec import DataFacts, DecoderSpec, ModelSpec, VaeSpec, by_channel_text
from elit_export.spec.limits import FACTOR, PARTS, VAE_CHANNELS

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE_PART = "vae"  # where a whole pipeline keeps its VAE
IMAGE_CHANNELS = (1, 3)
# Of these each becomes layers; whole numbers of other names are channels, or as small.
NUMBER_LIMITS = dict.fromkeys(
    ("layers_per_block", "num_res_blocks", "num_encoder_blocks", "num_decoder_blocks", "dim_mult"), PARTS
)
MAX_FLOAT = sys.float_info.max
UNKNOWN = ("", "unknown")  # values of `DataFacts.vae` for which scale and shift are not known
TOLERANCE = 1e-6
Numbers = tuple[float, ...]  # one for each channel


@dataclass(frozen=True)
class DecoderFolder:
    """A decoder whose configuration was read; its weights are still on disk."""

    path: Path
    class_name: str
    vae: VaeSpec

    @cached_property
    def sha256(self) -> str:
        """Hash configuration and weights together."""
        hashes = [sha256_of(self.path / name) for name in (CONFIG, WEIGHTS)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @property
    def kind(self) -> Kind:
        return KINDS[self.class_name]

    def spec(self, side: int) -> DecoderSpec:
        return DecoderSpec(**vars(self.vae), side=side)

    def check_fits(self, spec: ModelSpec, data: DataFacts) -> None:
        """Raise RecipeError if the model makes no latents, or latents that this decoder does not take."""
        if data.kind != "vae":
            raise RecipeError("decoder: this model makes pixels itself", "leave [decoder] out of the recipe")
        if self.vae.channels != spec.in_channels:
            raise RecipeError(
                f"decoder: {self.path} decodes latents of {self.vae.channels} channels, the model makes "
                f"{spec.in_channels}",
                "give the folder of the VAE that the model was trained with",
            )
        if self.kind.keeps_scale and data.vae not in UNKNOWN:
            self._check_scale(data)

    def _check_scale(self, data: DataFacts) -> None:
        """Raise RecipeError for latents in another scale or shift, of which the decoder would draw wrong pictures."""
        scale, shift = data.of_channels(self.vae.channels)
        for what, own, model in (("scale", self.vae.scale, scale), ("shift", self.vae.shift, shift)):
            if not all(
                math.isclose(*pair, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for pair in zip(own, model, strict=True)
            ):
                raise RecipeError(
                    f"decoder: {self.path} has the {what} {by_channel_text(own)}, the latents of this model "
                    f"({data.vae}) have {by_channel_text(model)}",
                    "give the folder of the VAE that the model was "
                    "trained with, or if this is it, set `model.data` to its numbers and save the checkpoint again",
                )


def read_decoder(folder: str | Path) -> DecoderFolder:
    """Read the configuration in `folder`, or in its `vae`; raises CheckpointError."""
    path = part_folder(Path(folder), PIPELINE_PART, "decoder", "give a folder that diffusers saved (save_pretrained)")
    config = read_json_object(path / CONFIG)
    check_numbers(path / CONFIG, config, NUMBER_LIMITS, VAE_CHANNELS)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise CheckpointError(f"{path}: its class is {name!r}; known: {', '.join(KINDS)}")
    _check_weights(path, name)
    return _described(path, name, _Config(path / CONFIG, {**KINDS[name].defaults, **config}))


def _check_weights(path: Path, class_name: str) -> None:
    if (path / WEIGHTS).is_file():
        return
    others = sorted(file.name for file in path.glob("*") if file.suffix in (".bin", ".safetensors", ".pt", ".ckpt"))
    remedy = f"save it again with diffusers: {class_name}.from_pretrained(…).save_pretrained(FOLDER)"
    if any(name.endswith((".bin", ".pt", ".ckpt")) for name in others):
        remedy = f"{remedy}; pickled weights are not read, as they can run any code"
    has = f" (it has {', '.join(others)})" if others else ""
    raise CheckpointError(f"{path}: no weights, {WEIGHTS} is missing{has}", remedy)


def _described(path: Path, name: str, config: _Config) -> DecoderFolder:
    kind = KINDS[name]
    image_channels = config.count(kind.image_channels)
    if image_channels not in IMAGE_CHANNELS:
        raise CheckpointError(f"{config.path}: {kind.image_channels} is {image_channels}: images have 1 or 3 channels")
    factor = kind.factor(config)
    if problem := FACTOR.problem(factor, "the number of pixels along a latent"):
        raise CheckpointError(f"{config.path}: {problem}", "copy the folder again")
    channels = config.count(kind.channels)
    scale, shift = kind.normalisation(config, channels)
    vae = VaeSpec(channels=channels, image_channels=image_channels, scale=scale, shift=shift, factor=factor)
    return DecoderFolder(path, name, vae)


# ---------------------------------------------------------------- values of a configuration


@dataclass(frozen=True)
class _Config:
    """A configuration whose values are checked as they are taken; raises CheckpointError naming file and key."""

    path: Path
    values: Mapping[str, Any]

    def count(self, name: str) -> int:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "a whole number of at least 1")
        return value

    def number(self, name: str) -> float:
        value = self.values[name]
        if not _is_finite(value):
            raise self.error(name, "a finite number")
        return float(value)

    def numbers(self, name: str, count: int) -> Numbers:
        value = self.values[name]
        if not isinstance(value, list) or len(value) != count or not all(map(_is_finite, value)):
            raise self.error(name, f"a list of {count} finite numbers, one for each channel")
        return tuple(map(float, value))

    def length(self, name: str) -> int:
        value = self.values[name]
        if not isinstance(value, list) or not value:
            raise self.error(name, "a list")
        return len(value)

    def error(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} is {self.values[name]!r}, must be {expected}")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT


# ---------------------------------------------------------------- classes of diffusers


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The rules by which the configuration of one class of diffusers is read.

    `defaults` are those of its constructor: files of old versions leave many values out. `channels` and
    `image_channels` are names of values. `factor` computes the pixels along a latent; `normalisation` the scale and
    shift of each channel. `keeps_scale`: it decodes latents in the scale of its own encoder. `has_frames`: it makes
    videos, and a picture is the first frame.
    """

    defaults: Mapping[str, Any]
    channels: str
    image_channels: str
    factor: Callable[[_Config], int]
    normalisation: Callable[[_Config, int], tuple[Numbers, Numbers]]
    keeps_scale: bool = True
    has_frames: bool = False


def _doubled(config: _Config) -> int:
    """Return the factor of a decoder in which every stage but the last doubles the sides."""
    return 1 << (config.length("block_out_channels") - 1)


def _multiplied(config: _Config) -> int:
    """Return the factor of AutoencoderTiny, whose stages multiply the sides by `upsampling_scaling_factor`."""
    stages = config.length("decoder_block_out_channels")
    return int(config.count("upsampling_scaling_factor") ** (stages - 1))


def _doubled_frames(config: _Config) -> int:
    """Return the factor of AutoencoderKLQwenImage, whose config also says which stages add frames."""
    stages, adds_frames = config.length("dim_mult"), config.values["temperal_downsample"]
    if not isinstance(adds_frames, list) or len(adds_frames) != stages - 1:
        raise config.error("temperal_downsample", f"a list of {stages - 1} values: dim_mult has {stages} stages")
    return 1 << (stages - 1)


def _shared(config: _Config, channels: int) -> tuple[Numbers, Numbers]:
    """Read one scaling_factor and one shift_factor for all channels."""
    for key in ("latents_mean", "latents_std"):
        if config.values.get(key) is not None:
            raise CheckpointError(
                f"{config.path}: {key} is given: of this class only latents of one scaling_factor and shift_factor "
                f"are known here, not those normalised channel by channel"
            )
    scale = config.number("scaling_factor")
    if scale <= 0:
        raise CheckpointError(
            f"{config.path}: scaling_factor is {scale:g}, must be positive",
            "correct it: latents are divided by it",
        )
    shift = 0.0 if config.values["shift_factor"] is None else config.number("shift_factor")
    return (scale,) * channels, (shift,) * channels


def _of_each_channel(config: _Config, channels: int) -> tuple[Numbers, Numbers]:
    """Read latents_mean and latents_std: z = latents · std + mean."""
    deviations = config.numbers("latents_std", channels)
    scale = tuple(1 / deviation if deviation > 0 else 0.0 for deviation in deviations)
    if not all(0 < number <= MAX_FLOAT for number in scale):
        raise config.error("latents_std", "positive numbers; latents are multiplied by them")
    return scale, config.numbers("latents_mean", channels)


KINDS = {
    "AutoencoderKL": Kind(
        defaults={
            "latent_channels": 4,
            "out_channels": 3,
            "scaling_factor": 0.18215,
            "shift_factor": None,
            "block_out_channels": [64],
        },
        channels="latent_channels",
        image_channels="out_channels",
        factor=_doubled,
        normalisation=_shared,
    ),
    "AutoencoderTiny": Kind(
        defaults={
            "latent_channels": 4,
            "out_channels": 3,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "decoder_block_out_channels": [64, 64, 64, 64],
            "upsampling_scaling_factor": 2,
        },
        channels="latent_channels",
        image_channels="out_channels",
        factor=_multiplied,
        normalisation=_shared,
        keeps_scale=False,  # it decodes latents in the model's scale, not in that of the VAE it replaces
    ),
    "AutoencoderKLQwenImage": Kind(
        defaults={
            "z_dim": 16,
            "dim_mult": [1, 2, 4, 4],
            "temperal_downsample": [False, True, True],
            "input_channels": 3,
            "latents_mean": [
                *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
                *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
            ],
            "latents_std": [
                *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
                *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
            ],
        },
        channels="z_dim",
        image_channels="input_channels",
        factor=_doubled_frames,
        normalisation=_of_each_channel,
        has_frames=True,
    ),
}
