"""Time and error of a decoder of the SD-VAE's shape with random weights, where the published ones are not at hand.

    python benchmarks/decoder.py [--sides 32 64] [--rounds 3]

A row for each size of latents: one image by ONNX Runtime on this CPU, and how far it is from what diffusers makes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from elit_export.backends import BACKENDS
from elit_export.compile import ANY_BUDGET
from elit_export.decoder import VaeDecoder, load_decoder, read_decoder
from elit_export.graphs.export import export_decoder
from elit_export.recipe import OnnxRuntimeTarget
from elit_export.spec import DECODE, DecoderSpec, Precision, Profile, Range
from elit_export.verify.cases import decoder_inputs
from elit_export.verify.metrics import difference
from elit_export.verify.timing import timed_in_turn

SIDES = (32, 64)
CHANNELS = (128, 256, 512, 512)
ONE = Range(1, 1, 1)


def save_random_vae(folder: Path) -> Path:
    """The shape of stabilityai/sd-vae-ft-ema, as diffusers saves it."""
    torch.manual_seed(0)
    stages = len(CHANNELS)
    vae = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=2,
        latent_channels=4,
    )
    vae.save_pretrained(folder)
    return folder


def measure(vae: AutoencoderKL, decoder: VaeDecoder, spec: DecoderSpec, folder: Path, rounds: int) -> str:
    graph = export_decoder(decoder, spec, folder)
    backend = BACKENDS["onnxruntime"]
    target = OnnxRuntimeTarget(backend="onnxruntime", device="cpu", precision=Precision.FP32)
    profiles = (Profile(DECODE, ANY_BUDGET, ONE),)
    (folder / "plan").mkdir()
    built = backend.builder().build_plan(graph, folder / "plan", profiles, target, None, lambda _share: None)
    inputs = decoder_inputs(1, spec)
    with torch.inference_mode():
        expected = vae.decode(torch.from_numpy(inputs["z"])).sample.numpy()
    with backend.engines().OnnxRuntimeEngine(folder / "plan" / built.file, device="cpu", threads=0) as engine:
        found = difference(engine(inputs)["pixels"], expected)
        timing = timed_in_turn({"": lambda: engine(inputs)}, rounds=rounds, warmup=0)[""]
    pixels = spec.side * spec.factor
    return (
        f"{spec.side}×{spec.side} latents → {pixels}×{pixels} pixels: {timing.median_ms:.0f} ms per image, "
        f"SQNR {found.sqnr_db:.1f} dB, max error {found.max_relative:.1e} of the largest value"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = save_random_vae(Path(name) / "vae")
        found = read_decoder(folder)
        vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
        decoder = load_decoder(found)
        for side in arguments.sides:
            print(measure(vae, decoder, found.spec(side), Path(name) / str(side), arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
