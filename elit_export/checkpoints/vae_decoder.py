"""A folder that diffusers saved → the decoder of a VAE.

diffusers makes the module, and is imported only then; the weights are never unpickled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from elit_export.checkpoints.hf_folder import CONFIG
from elit_export.checkpoints.vae import WEIGHTS, DecoderFolder
from elit_export.errors import BackendUnavailable, CheckpointError, summary

OWN_KEYS = ("decoder.", "post_quant_conv.")  # a folder also holds the encoder, which is not needed here
# What diffusers raises of files that it cannot read or that do not fit, and what of values that no model has.
OF_FILES = (OSError, RuntimeError, ValueError)
OF_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)


class VaeDecoder(nn.Module):
    """The decoding half of a VAE, in float32: z (B, C, h, w) → pixels in about [−1, 1] (B, 3, h·f, w·f).

    One with frames makes videos (B, 3, T, h·f, w·f); a picture is one of a single frame.
    """

    def __init__(self, autoencoder: Any, *, has_frames: bool) -> None:
        super().__init__()
        has_conv = getattr(autoencoder, "post_quant_conv", None) is not None
        self.post_quant_conv: nn.Module = autoencoder.post_quant_conv if has_conv else nn.Identity()
        self.decoder: nn.Module = autoencoder.decoder
        self.has_frames = has_frames

    def forward(self, z: Tensor) -> Tensor:
        z = z.unsqueeze(2) if self.has_frames else z
        pixels: Tensor = self.decoder(self.post_quant_conv(z))
        return pixels.squeeze(2) if self.has_frames else pixels


def check_installed() -> None:
    """Raise BackendUnavailable if diffusers is not here."""
    if find_spec("diffusers") is None:
        raise BackendUnavailable("a [decoder] needs diffusers", "pip install 'elit-export[diffusers]'")


def load_decoder(folder: DecoderFolder) -> VaeDecoder:
    """The module with its weights; raises CheckpointError if they are damaged or not those of the configuration."""
    decoder = VaeDecoder(_autoencoder(folder), has_frames=folder.kind.has_frames)
    decoder.float().eval().requires_grad_(requires_grad=False)
    with _named(folder), torch.inference_mode():
        pixels = decoder(torch.zeros(1, folder.vae.channels, 2, 2))
    wanted = (1, folder.vae.image_channels, 2 * folder.vae.factor, 2 * folder.vae.factor)
    if pixels.shape != wanted:
        raise CheckpointError(f"{folder.path}: it makes {tuple(pixels.shape)} of 2 × 2 latents, {CONFIG} says {wanted}")
    if not pixels.isfinite().all():
        raise CheckpointError(f"{folder.path}: its weights give pixels that are not finite", "copy them again")
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
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}",
            "copy the folder again",
        )
    return made


@contextmanager
def _named(folder: DecoderFolder) -> Iterator[None]:
    """Raise CheckpointError for what diffusers raises of files that it cannot read and of values that no model has."""
    try:
        yield
    except OF_FILES as error:
        raise CheckpointError(
            f"{folder.path}: diffusers cannot read it: {summary(error, lines=2)}", "copy the folder again"
        ) from error
    except OF_VALUES as error:
        raise CheckpointError(
            f"{folder.path / CONFIG}: diffusers makes no {folder.class_name} of it: {type(error).__name__}: "
            f"{summary(error, lines=2)}",
            "copy the folder again",
        ) from error


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
