"""A folder that diffusers saved → the decoder of a VAE.

Takes: a folder with `config.json` and safetensors.  Gives: what it says of itself, and a module.
May touch: that folder (reading).  Knows nothing of: graphs, bundles, the network.

AutoencoderKL and AutoencoderTiny are known. The configuration is read and checked without diffusers, which is
imported only to make the module; the weights are never unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elit_export.errors import BackendUnavailable, CheckpointError, RecipeError
from elit_export.files import json_table, sha256_of
from elit_export.spec import DataFacts, DecoderSpec, ModelSpec

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OF_PIPELINE = "vae"  # where a whole pipeline keeps its VAE
OWN_KEYS = ("decoder.", "post_quant_conv.")  # a folder also holds the encoder, which is not needed here
IMAGE_CHANNELS = (1, 3)
MOST_FACTOR = 64  # pixels along a latent; real ones have 8 to 32
LARGEST = sys.float_info.max
UNKNOWN = ("", "unknown")  # as `DataFacts.vae`, where nobody said what its scale and shift are
SAME = 1e-6
# AutoencoderTiny has none of the VAE that it stands in for: it decodes latents as the model makes them.
KEEPS_SCALE = ("AutoencoderKL",)
# What diffusers raises of files that it cannot read or that do not fit, and what of values that no model has.
OF_FILES = (OSError, RuntimeError, ValueError)
OF_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
# What the constructors of diffusers take where a configuration says nothing: files of old versions leave much out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "latent_channels": 4,
        "out_channels": 3,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "block_out_channels": [64],
    },
    "AutoencoderTiny": {
        "latent_channels": 4,
        "out_channels": 3,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "decoder_block_out_channels": [64, 64, 64, 64],
        "upsampling_scaling_factor": 2,
    },
}


# ---------------------------------------------------------------- what a folder says


@dataclass(frozen=True)
class DecoderFolder:
    """A decoder whose configuration was read; its weights are still on disk."""

    path: Path
    class_name: str
    channels: int
    image_channels: int
    scale: float
    shift: float
    factor: int

    @cached_property
    def sha256(self) -> str:
        """Of configuration and weights."""
        hashes = [sha256_of(self.path / name) for name in (CONFIG, WEIGHTS)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def spec(self, side: int) -> DecoderSpec:
        return DecoderSpec(
            channels=self.channels,
            image_channels=self.image_channels,
            scale=self.scale,
            shift=self.shift,
            factor=self.factor,
            side=side,
        )

    def check_fits(self, spec: ModelSpec, data: DataFacts) -> None:
        """Raise RecipeError if a model makes no latents, or other ones."""
        if data.kind != "vae":
            raise RecipeError("decoder: this model makes pixels itself; leave [decoder] out of the recipe")
        if self.channels != spec.in_channels:
            raise RecipeError(
                f"decoder: {self.path} decodes latents of {self.channels} channels, the model makes "
                f"{spec.in_channels}; give the folder of the VAE that the model was trained with"
            )
        if self.class_name in KEEPS_SCALE and data.vae not in UNKNOWN:
            self._check_scale(data)

    def _check_scale(self, data: DataFacts) -> None:
        """A decoder would draw wrong pictures of latents in another scale, and nothing else would tell."""
        for what, own, models in (("scale", self.scale, data.scale), ("shift", self.shift, data.shift)):
            if not math.isclose(own, models, rel_tol=SAME, abs_tol=SAME):
                raise RecipeError(
                    f"decoder: {self.path} has the {what} {own:g}, the latents of this model ({data.vae}) have "
                    f"{models:g}; give the folder of the VAE that the model was trained with, or if this is it, set "
                    f"`model.data` to its numbers and save the checkpoint again"
                )


def read_decoder(folder: str | Path) -> DecoderFolder:
    """Read the configuration in `folder`, or in its `vae`; raises CheckpointError."""
    path = _decoder_path(Path(folder))
    config = json_table(path / CONFIG)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in DEFAULTS:
        raise CheckpointError(f"{path}: its class is {name!r}; known: {', '.join(DEFAULTS)}")
    _check_weights(path)
    return _described(path, name, _Config(path / CONFIG, {**DEFAULTS[name], **config}))


def _decoder_path(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"no decoder at {folder}: give a folder that diffusers saved (save_pretrained)")
    for path in (folder, folder / OF_PIPELINE):
        if (path / CONFIG).is_file():
            return path
    raise CheckpointError(f"{folder}: no {CONFIG} in it or in its `{OF_PIPELINE}`; give a folder that diffusers saved")


def _check_weights(path: Path) -> None:
    if (path / WEIGHTS).is_file():
        return
    others = sorted(file.name for file in path.glob("*") if file.suffix in (".bin", ".safetensors", ".pt", ".ckpt"))
    remedy = "save it again with diffusers: AutoencoderKL.from_pretrained(…).save_pretrained(FOLDER)"
    if any(name.endswith((".bin", ".pt", ".ckpt")) for name in others):
        remedy = f"{remedy}; pickled weights are not read, as they can run any code"
    has = f" (it has {', '.join(others)})" if others else ""
    raise CheckpointError(f"{path}: no weights, {WEIGHTS} is missing{has}; {remedy}")


@dataclass(frozen=True)
class _Config:
    """A configuration whose values are checked as they are taken; raises CheckpointError naming file and key."""

    path: Path
    values: Mapping[str, Any]

    def count(self, name: str) -> int:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, "a whole number of at least 1")
        return value

    def number(self, name: str) -> float:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise self._wrong(name, "a finite number")
        return float(value)

    def length(self, name: str) -> int:
        value = self.values[name]
        if not isinstance(value, list) or not value:
            raise self._wrong(name, "a list")
        return len(value)

    def _wrong(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} is {self.values[name]!r}, must be {wanted}")


def _described(path: Path, name: str, config: _Config) -> DecoderFolder:
    for key in ("latents_mean", "latents_std"):
        if config.values.get(key) is not None:
            raise CheckpointError(
                f"{config.path}: {key} is given: latents normalised channel by channel are not known here, "
                f"only those of one scaling_factor and shift_factor"
            )
    image_channels = config.count("out_channels")
    if image_channels not in IMAGE_CHANNELS:
        raise CheckpointError(f"{config.path}: out_channels is {image_channels}: images have 1 or 3 channels")
    scale = config.number("scaling_factor")
    if scale <= 0:
        raise CheckpointError(
            f"{config.path}: scaling_factor is {scale:g}, must be positive; latents are divided by it"
        )
    factor = _factor(name, config)
    if factor > MOST_FACTOR:
        raise CheckpointError(f"{config.path}: a latent would be {factor} pixels wide, at most {MOST_FACTOR} are known")
    return DecoderFolder(
        path=path,
        class_name=name,
        channels=config.count("latent_channels"),
        image_channels=image_channels,
        scale=scale,
        shift=0.0 if config.values["shift_factor"] is None else config.number("shift_factor"),
        factor=factor,
    )


def _factor(name: str, config: _Config) -> int:
    """Every stage of the decoder but the last doubles the sides, or in AutoencoderTiny multiplies them."""
    if name == "AutoencoderTiny":
        stages = config.length("decoder_block_out_channels")
        return int(config.count("upsampling_scaling_factor") ** (stages - 1))
    return 1 << (config.length("block_out_channels") - 1)


# ---------------------------------------------------------------- the module


class VaeDecoder(nn.Module):
    """The decoding half of a VAE, in float32: z (B, C, h, w) → pixels in about [−1, 1] (B, 3, h·f, w·f)."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        has_conv = getattr(autoencoder, "post_quant_conv", None) is not None
        self.post_quant_conv: nn.Module = autoencoder.post_quant_conv if has_conv else nn.Identity()
        self.decoder: nn.Module = autoencoder.decoder

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(z))
        return pixels


def check_installed() -> None:
    """Raise BackendUnavailable if diffusers is not here."""
    if find_spec("diffusers") is None:
        raise BackendUnavailable("a [decoder] needs diffusers: pip install 'elit-export[diffusers]'")


def load_decoder(folder: DecoderFolder) -> VaeDecoder:
    """The module with its weights; raises CheckpointError if they are damaged or not those of the configuration."""
    decoder = VaeDecoder(_autoencoder(folder)).float().eval().requires_grad_(False)
    with _named(folder), torch.inference_mode():
        pixels = decoder(torch.zeros(1, folder.channels, 2, 2))
    wanted = (1, folder.image_channels, 2 * folder.factor, 2 * folder.factor)
    if pixels.shape != wanted:
        raise CheckpointError(f"{folder.path}: it makes {tuple(pixels.shape)} of 2 × 2 latents, {CONFIG} says {wanted}")
    if not pixels.isfinite().all():
        raise CheckpointError(f"{folder.path}: its weights give pixels that are not finite; copy them again")
    return decoder


def _autoencoder(folder: DecoderFolder) -> Any:
    """The model as diffusers makes it, which also knows older names of weights."""
    check_installed()
    import diffusers  # seconds

    with _named(folder), _quiet():
        made, found = getattr(diffusers, folder.class_name).from_pretrained(
            folder.path,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # the other way needs one more library
            output_loading_info=True,
        )
    wrong = [f"missing {key}" for key in sorted(found["missing_keys"]) if key.startswith(OWN_KEYS)]
    wrong += [f"unknown {key}" for key in sorted(found["unexpected_keys"]) if key.startswith(OWN_KEYS)]
    if wrong:
        raise CheckpointError(
            f"{folder.path}: {WEIGHTS} does not fit {CONFIG}: {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; copy the folder again"
        )
    return made


@contextmanager
def _named(folder: DecoderFolder) -> Iterator[None]:
    """Raise CheckpointError for what diffusers raises of files that it cannot read and of values that no model has."""
    try:
        yield
    except OF_FILES as error:
        raise CheckpointError(
            f"{folder.path}: diffusers cannot read it: {_said(error)}; copy the folder again"
        ) from error
    except OF_VALUES as error:
        raise CheckpointError(
            f"{folder.path / CONFIG}: diffusers makes no {folder.class_name} of it: {type(error).__name__}: "
            f"{_said(error)}; copy the folder again"
        ) from error


def _said(error: BaseException) -> str:
    """Its first two lines: of weights in another shape, the second names them."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2]).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers tells of missing weights, which are an error here, and of a name in its own configurations."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
