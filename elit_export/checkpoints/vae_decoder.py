"""A VAE folder that diffusers saved → its decoder as a PyTorch module.

diffusers builds the module and is imported only then. Weights are never unpickled.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from elit_export.checkpoints.hf_folder import CONFIG, is_of_memory
from elit_export.checkpoints.vae import WEIGHTS, DecoderFolder
from elit_export.errors import BackendUnavailable, CheckpointError, pip_install, summary

OWN_KEYS = ("decoder.", "post_quant_conv.")  # a folder also holds the encoder, which is not needed here
MAX_MISSING = 4  # times as many numbers as the weights have: what is missing of fewer is told by name
# What diffusers raises for files that it cannot read or that do not fit, and for values that no model has.
FILE_ERRORS = (SafetensorError, OSError, RuntimeError, ValueError)
VALUE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)


class VaeDecoder(nn.Module):
    """The decoding half of a VAE, in float32: z (B, C, h, w) → pixels in about [−1, 1] (B, 3, h·f, w·f).

    A decoder with frames makes videos (B, 3, T, h·f, w·f); a picture is a video of one frame.
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
    """Raise BackendUnavailable if diffusers is not installed."""
    if find_spec("diffusers") is None:
        raise BackendUnavailable("a [decoder] needs diffusers", pip_install("diffusers"))


def load_decoder(folder: DecoderFolder) -> VaeDecoder:
    """Load the module with its weights; raises CheckpointError if they are damaged or do not fit the configuration."""
    decoder = VaeDecoder(_autoencoder(folder), has_frames=folder.kind.has_frames)
    with _as_checkpoint_errors(folder), torch.inference_mode():
        decoder.float().eval().requires_grad_(requires_grad=False)
        pixels = decoder(torch.zeros(1, folder.vae.channels, 2, 2))
    expected = (1, folder.vae.image_channels, 2 * folder.vae.factor, 2 * folder.vae.factor)
    if pixels.shape != expected:
        raise CheckpointError(
            f"{folder.path}: it makes {tuple(pixels.shape)} of 2 × 2 latents, {CONFIG} says {expected}"
        )
    if not pixels.isfinite().all():
        raise CheckpointError(f"{folder.path}: its weights give pixels that are not finite", "copy them again")
    return decoder


def _autoencoder(folder: DecoderFolder) -> Any:
    """Load the model by diffusers, which also knows older names of weights."""
    check_installed()
    import diffusers  # seconds

    with _as_checkpoint_errors(folder), _quiet():
        _check_size(folder, getattr(diffusers, folder.class_name))
        autoencoder, report = getattr(diffusers, folder.class_name).from_pretrained(
            folder.path,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # True needs one more library
            output_loading_info=True,
        )
    mismatches = [f"missing {key}" for key in sorted(report["missing_keys"]) if key.startswith(OWN_KEYS)]
    mismatches += [f"unknown {key}" for key in sorted(report["unexpected_keys"]) if key.startswith(OWN_KEYS)]
    if mismatches:
        raise CheckpointError(
            f"{folder.path}: {WEIGHTS} does not fit {CONFIG}: {', '.join(mismatches[:3])}"
            f"{f' and {len(mismatches) - 3} more' if len(mismatches) > 3 else ''}",
            "copy the folder again",
        )
    return autoencoder


def _check_size(folder: DecoderFolder, model_class: Any) -> None:
    """Raise CheckpointError if the weights have far fewer numbers than the decoder, before memory is taken for it."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        state = model_class.from_config(model_class.load_config(folder.path, local_files_only=True)).state_dict()
    needed = sum(tensor.numel() for name, tensor in state.items() if name.startswith(OWN_KEYS))
    with safe_open(folder.path / WEIGHTS, framework="pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.offset_keys())
    if stored * MAX_MISSING < needed:
        raise CheckpointError(
            f"{folder.path}: {WEIGHTS} has {stored:,} numbers, the decoder of {CONFIG} {needed:,}",
            "copy the folder again",
        )


@contextmanager
def _as_checkpoint_errors(folder: DecoderFolder) -> Iterator[None]:
    """Turn what diffusers raises for unreadable files and impossible values into CheckpointError.

    Raises BackendUnavailable if memory runs out.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (MemoryError, *FILE_ERRORS) as error:
        if is_of_memory(error):
            raise BackendUnavailable(
                f"{folder.path}: not enough memory ({summary(error, lines=2)})", "build on a machine with more memory"
            ) from error
        raise CheckpointError(
            f"{folder.path}: diffusers cannot read it: {summary(error, lines=2)}", "copy the folder again"
        ) from error
    except VALUE_ERRORS as error:
        raise CheckpointError(
            f"{folder.path / CONFIG}: diffusers cannot make {folder.class_name} of it: {type(error).__name__}: "
            f"{summary(error, lines=2)}",
            "copy the folder again",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers, which logs missing weights (an error here anyway) and a name in its own configurations."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
