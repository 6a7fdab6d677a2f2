"""Small random decoders, saved by diffusers itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from elit_export.decoder import load_decoder, read_decoder
from elit_export.runtime.decoding import Decoder, Float32
from elit_export.spec import Range
from tests.helpers import weights_by_name

KL_STAGES = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
# Two stages, so that a latent is 2 × 2 pixels: with the eight of real ones nothing here would be different but slower.
KL: dict[str, Any] = {**KL_STAGES, "block_out_channels": (8, 16), "norm_num_groups": 4}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}
MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kl4": (AutoencoderKL, {**KL, "latent_channels": 4}),
    "kl16": (
        AutoencoderKL,
        {
            **KL,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "tiny4": (AutoencoderTiny, {**TINY, "latent_channels": 4}),
    "tiny16": (AutoencoderTiny, {**TINY, "latent_channels": 16}),
}


def save_vae(name: str, folder: Path, *, seed: int = 11) -> Path:
    """A random autoencoder with nothing near zero in it."""
    maker, facts = MAKERS[name]
    vae = maker(**facts)
    shapes = {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    weights = weights_by_name(shapes, seed=seed)
    norms = [key for key in weights if re.search(r"norm(\d|_out)?\.weight$", key)]
    vae.load_state_dict(weights | {key: 1 + weights[key] for key in norms})
    vae.save_pretrained(folder)
    return folder


def load_vae(folder: Path) -> Any:
    """As anyone would, with diffusers."""
    maker = MAKERS[folder.name.partition("-")[0]][0]
    return maker.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def decoded(vae: Any, latents: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Pixels by diffusers' own `decode`, fed as its pipelines feed it."""
    z = torch.from_numpy(latents.astype(np.float32)) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.no_grad():
        pixels: npt.NDArray[np.float32] = vae.decode(z).sample.numpy()
    return pixels


def pictures(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """As diffusers' own image processor makes them."""
    shares = (pixels / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    return (shares * 255).round().astype(np.uint8)


def torch_decoder(folder: Path, side: int) -> Decoder:
    """The runtime's decoding with PyTorch in place of an engine."""
    found = read_decoder(folder)
    module = load_decoder(found)

    def run(z: Float32) -> Float32:
        with torch.inference_mode():
            return module(torch.from_numpy(z)).numpy()

    return Decoder(run, found.spec(side), Range(1, 1, 4))
