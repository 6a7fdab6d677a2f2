"""Small random decoders, saved by diffusers itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny
from torch import Tensor

from elit_export.arrays import Float32
from elit_export.checkpoints.vae import read_decoder
from elit_export.checkpoints.vae_decoder import load_decoder
from elit_export.runtime.vae import Decoder
from elit_export.spec import DataFacts, Range
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
# The first half of what published ones say.
MEANS = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
STDS = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
QWEN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 8,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": list(MEANS),
    "latents_std": list(STDS),
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
    "qwen8": (AutoencoderKLQwenImage, QWEN),
}
# What a model says of its latents, by their channels: those that the encoders here would make.
LATENTS = {
    4: DataFacts(kind="vae", scale=0.18215, vae="small"),
    8: DataFacts(kind="vae", scale=tuple(1 / std for std in STDS), shift=MEANS, vae="small"),
    16: DataFacts(kind="vae", scale=0.3611, shift=0.1159, vae="small"),
}


def save_vae(name: str, folder: Path, *, seed: int = 11, **changes: Any) -> Path:
    """A random autoencoder with nothing near zero in it."""
    maker, facts = MAKERS[name]
    vae = maker(**(facts | changes))
    shapes = {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    weights = weights_by_name(shapes, seed=seed)
    if maker is AutoencoderKLQwenImage:  # `decode` cuts off pixels beyond 1, an engine leaves that to pictures
        weights["decoder.conv_out.weight"] /= 2
    norms = [key for key in weights if re.search(r"norm(\d|_out)?\.(weight|gamma)$", key)]
    vae.load_state_dict(weights | {key: 1 + weights[key] for key in norms})
    vae.save_pretrained(folder)
    return folder


def load_vae(folder: Path) -> Any:
    """As anyone would, with diffusers."""
    maker = MAKERS[folder.name.partition("-")[0]][0]
    return maker.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def fed(vae: Any, latents: npt.NDArray[Any]) -> Tensor:
    """What diffusers' pipelines make of latents before they decode them."""
    values, config = torch.from_numpy(latents.astype(np.float32)), vae.config
    if isinstance(vae, AutoencoderKLQwenImage):
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (config.latents_mean, config.latents_std))
        return values / (1.0 / std) + mean
    return values / config.scaling_factor + (config.shift_factor or 0.0)


def pixels_of(vae: Any, z: Tensor) -> Tensor:
    """By diffusers' own `decode`; of one that makes videos, the only frame."""
    has_frames = isinstance(vae, AutoencoderKLQwenImage)
    with torch.no_grad():
        pixels: Tensor = vae.decode(z.unsqueeze(2) if has_frames else z).sample
    return pixels.squeeze(2) if has_frames else pixels


def decoded(vae: Any, latents: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Pixels as diffusers' pipelines make them."""
    pixels: npt.NDArray[np.float32] = pixels_of(vae, fed(vae, latents)).numpy()
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
