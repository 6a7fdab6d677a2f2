"""Time and error of decoders with random weights in published shapes, where the published ones are not at hand.

    python benchmarks/decoder.py [--vae sd qwen] [--sides 32 64] [--rounds 3]

A row for each VAE (`sd`: stabilityai/sd-vae-ft-ema, `qwen`: that of Qwen-Image) and size of latents: one image by ONNX
Runtime on this CPU, and how far it is from what diffusers makes, and in what time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from torch import Tensor

from elit_export.backends.onnxruntime.build import BUILDERS
from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.onnxruntime.options import OnnxRuntimeTarget
from elit_export.backends.protocols import GraphFile
from elit_export.bench.timing import timed_in_turn
from elit_export.checkpoints.vae import read_decoder
from elit_export.checkpoints.vae_decoder import VaeDecoder, load_decoder
from elit_export.compiler.stages import ANY_BUDGET
from elit_export.graphs.export import export_decoder
from elit_export.spec import DECODE, DecoderSpec, Precision, Profile, Range
from elit_export.verify.cases import decoder_inputs
from elit_export.verify.metrics import difference

SIDES = (32, 64)
ONE = Range(1, 1, 1)
Decode = Callable[[Tensor], Tensor]  # z (1, C, s, s) → pixels, as diffusers does it


def sd_vae(folder: Path) -> Decode:
    """Save one in the shape of the SD-VAE."""
    channels = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=4,
    )
    vae.eval().save_pretrained(folder)
    return lambda z: vae.decode(z).sample


def qwen_vae(folder: Path) -> Decode:
    """Save one in the shape of Qwen-Image's, which is what its class has by itself."""
    vae = AutoencoderKLQwenImage().eval()
    vae.save_pretrained(folder)
    return lambda z: vae.decode(z.unsqueeze(2)).sample.squeeze(2)


VAES = {"sd": sd_vae, "qwen": qwen_vae}


def measure(decode: Decode, decoder: VaeDecoder, spec: DecoderSpec, folder: Path, rounds: int) -> str:
    graph = GraphFile(export_decoder(decoder, spec, folder), spec.graph)
    target = OnnxRuntimeTarget(backend="onnxruntime", device="cpu", precision=Precision.FP32)
    profiles = (Profile(DECODE, ANY_BUDGET, ONE),)
    (folder / "plan").mkdir()
    built = BUILDERS["onnxruntime"].build_plan(graph, folder / "plan", profiles, target, None, lambda _share: None)
    inputs = decoder_inputs(1, spec)
    z = torch.from_numpy(inputs["z"])
    with (
        torch.inference_mode(),
        OnnxRuntimeEngine(folder / "plan" / built.file, device="cpu", threads=0) as engine,
    ):
        found = difference(engine(inputs)["pixels"], decode(z).numpy())
        timing = timed_in_turn({"engine": lambda: engine(inputs), "": lambda: decode(z)}, rounds=rounds, warmup=0)
    pixels = spec.side * spec.factor
    return (
        f"{spec.side}×{spec.side} latents → {pixels}×{pixels} pixels: {timing['engine'].median_ms:.0f} ms per image "
        f"({timing[''].median_ms:.0f} ms by diffusers), "
        f"SQNR {found.sqnr_db:.1f} dB, max error {found.max_relative:.1e} of the largest value"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", nargs="+", choices=VAES, default=list(VAES))
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for vae in arguments.vae:
        with tempfile.TemporaryDirectory() as name:
            torch.manual_seed(0)
            decode = VAES[vae](Path(name) / "vae")
            found = read_decoder(Path(name) / "vae")
            decoder = load_decoder(found)
            for side in arguments.sides:
                row = measure(decode, decoder, found.spec(side), Path(name) / str(side), arguments.rounds)
                print(f"{vae}: {row}", flush=True)


if __name__ == "__main__":
    main()
