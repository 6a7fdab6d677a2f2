"""What graphs and samples were before the package was rebuilt, stored in `tests/data/yardstick`.

    python -m tests.yardstick check

makes every graph again, compares its SHA-256 with the stored one and prints what differs. `tests/test_yardstick.py`
does so for graphs that other tests export too, and for the samples. Without `check` all is written anew, which is right
only after a change of library versions, or of an algorithm on purpose.

Changed on purpose since: `step` in int8 and fp8 of ELIT-U-ViT and ELIT-HDiT. Their joins, and what merges and splits
tokens, were left in float, because the patterns that chose layers by name matched none of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from elit_export import Pipeline, compile_bundle
from elit_export.backends.openvino.cpu import cpu_features
from elit_export.bundle.calibration_inputs import CalibrationFacts, CalibrationInputs
from elit_export.bundle.recipe import recipe_from_values
from elit_export.checkpoints.native import save_checkpoint
from elit_export.checkpoints.vae import read_decoder
from elit_export.checkpoints.vae_decoder import load_decoder
from elit_export.graphs.export import export_decoder, export_graph
from elit_export.graphs.quantize import quantized_graph
from elit_export.models.elit import Elit
from elit_export.runtime.prompts import Embedded, Prompts
from elit_export.spec import CACHE_GRAPHS, FUSED, MAX_TEXT_TOKENS, STEP, ModelSpec, Precision
from tests.helpers import VARIANTS, calibrate, fit_of, tiny_model
from tests.text_models import text_model
from tests.vae import save_vae

STORED = Path(__file__).parent / "data" / "yardstick"
BUNDLE, GRAPHS, SAMPLES = STORED / "bundle", STORED / "graphs.json", STORED / "samples.npz"
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "nvidia-modelopt", "diffusers", "numpy")
TEXT = "ELIT-MM-DiT"
SMALL = {"hidden_size": 8, "core_depth": 1, "mlp_ratio": 1.0}  # keeps the stored bundle below 300 kB
# Of the stored bundle, but for `text`, which is of the small model that takes text.
CONFIGS: dict[str, dict[str, Any]] = {
    "ab3": {"sampler": "ab3", "steps": 6, "guidance": "cfg:2"},
    "heun": {"sampler": "heun", "steps": 5, "time_grid": "shift:2.0"},
    "sde": {"sampler": "euler-maruyama", "steps": 6},
    "ccfg": {"sampler": "euler", "steps": 6, "guidance": "ccfg:3@1"},
    "interval": {"sampler": "ab2", "steps": 8, "guidance": "cfg:2", "guidance_interval": (0.2, 0.8)},
    "schedule": {"sampler": "ab3", "steps": 6, "schedule": "0-2:1,3-5:full", "guidance": "autoguidance:2@1"},
    "teacache": {"sampler": "euler", "steps": 12, "guidance": "cfg:2", "cache": "teacache:0.5,max_skip=3"},
    "text": {"sampler": "ab3", "steps": 6, "guidance": "cfg:4,norm", "cache": "static:every@2"},
}


def machine() -> dict[str, Any]:
    """What bytes depend on beside the code: constants are folded, and engines run, by the processor's own sums."""
    return {"libraries": {name: version(name) for name in LIBRARIES}, "cpu_features": cpu_features()}


# ---------------------------------------------------------------- graphs


@cache
def model_of(backbone: str) -> Elit:
    return text_model() if backbone == TEXT else tiny_model(**VARIANTS[backbone])


BACKBONES = (*VARIANTS, TEXT)
FLOATS = (Precision.FP32, Precision.FP16, Precision.BF16)
EIGHT_BITS = (Precision.INT8, Precision.FP8)
NAMES = (
    *((STEP, precision) for precision in (*FLOATS, *EIGHT_BITS)),
    *((name, Precision.FP32) for name in CACHE_GRAPHS),
    *((FUSED, precision) for precision in FLOATS),
)


def hashes_of(graph: Path) -> dict[str, str]:
    files = {"graph": graph, "data": graph.with_name(f"{graph.name}.data")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def graph_of(backbone: str, name: str, precision: Precision, folder: Path) -> Path:
    model = model_of(backbone)
    if precision not in EIGHT_BITS:
        return export_graph(model, name, folder, precision)
    exact = export_graph(model, name, folder / "exact")
    return quantized_graph(exact, folder / "quantized", precision, random_inputs(model.spec), model.spec)


def decoder_graph(folder: Path) -> Path:
    read = read_decoder(save_vae("kl4", folder / "vae"))
    return export_decoder(load_decoder(read), read.spec(8), folder)


def random_inputs(spec: ModelSpec) -> CalibrationInputs:
    """What 8 bits are calibrated on here: noise, which needs no engine."""
    count, generator = 64, np.random.default_rng(11)
    sizes = {"rows": count, "text": 5}
    values: dict[str, Any] = {}
    for tensor in spec.conditioning:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.dims]
        values[tensor.name] = generator.standard_normal(shape).astype(np.float32)
    values = {name: np.ones(array.shape, np.int64) if name == "text_mask" else array for name, array in values.items()}
    if "y" in values:
        values["y"] = generator.integers(0, spec.null_class + 1, count)
    facts = CalibrationFacts(
        package_version="0",
        checkpoint_sha256="0" * 64,
        seed=11,
        images=1,
        steps=1,
        sampler="euler",
        schedules=("full",),
        guidance=("none",),
        samples=count,
    )
    kept = np.array([spec.budgets[row % len(spec.budgets)].kept for row in range(count)], np.int64)
    x = generator.standard_normal((count, *spec.sample_shape)).astype(np.float32)
    return CalibrationInputs(facts, x, generator.uniform(0.02, 1, count).astype(np.float32), kept, values)


def all_hashes() -> Iterator[tuple[str, dict[str, str]]]:
    for backbone in BACKBONES:
        for name, precision in NAMES:
            with tempfile.TemporaryDirectory() as folder:
                yield (
                    f"{backbone} {name} {precision.value}",
                    hashes_of(graph_of(backbone, name, precision, Path(folder))),
                )
    with tempfile.TemporaryDirectory() as folder:
        yield "decode", hashes_of(decoder_graph(Path(folder)))


# ---------------------------------------------------------------- bundles and samples


def recipe_of(checkpoint: Path, **changes: Any) -> Any:
    values = {
        "name": "yardstick",
        "checkpoint": str(checkpoint),
        "rows": {"min": 1, "opt": 2, "max": 4},
        "profiles": [{"name": "every", "latents": {"min": 1, "opt": 2, "max": 4}}],
        "targets": {"cpu": {"backend": "onnxruntime", "device": "cpu", "precision": "fp32", "threads": 1}},
    }
    return recipe_from_values(values | changes, "yardstick")


def build_class_bundle(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.safetensors"
        save_checkpoint(checkpoint, tiny_model(**SMALL))
        compile_bundle(recipe_of(checkpoint), "cpu", out=out)
    calibrate(out, fit_of(None))
    (out / ".build.lock").unlink()


def build_text_bundle(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.safetensors"
        save_checkpoint(checkpoint, text_model())
        text = {"min": 2, "opt": 5, "max": 9}
        profiles = [{"name": "every", "latents": {"min": 1, "opt": 4, "max": 16}}]
        compile_bundle(recipe_of(checkpoint, text=text, profiles=profiles), "cpu", out=out)


def embedded(spec: ModelSpec, lengths: tuple[int, ...], seed: int) -> Embedded:
    longest = max(lengths)
    assert longest <= MAX_TEXT_TOKENS
    text = np.random.default_rng(seed).standard_normal((len(lengths), longest, spec.text_width)).astype(np.float32)
    return Embedded(text, (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64))


def sampled(bundle: Path, name: str) -> Any:
    """(B, C, H, W) float64."""
    with Pipeline.load(bundle) as pipeline:
        shown: Any = [0, 2]
        if name == "text":
            shown = Prompts(embedded(pipeline.spec, (5, 3), 0), embedded(pipeline.spec, (2, 4), 1))
        return pipeline.sample(shown, seed=5, **CONFIGS[name]).latents


def main() -> None:
    shutil.rmtree(STORED, ignore_errors=True)
    STORED.mkdir(parents=True)
    build_class_bundle(BUNDLE)
    with tempfile.TemporaryDirectory() as folder:
        build_text_bundle(Path(folder) / "bundle")
        places = {name: Path(folder) / "bundle" if name == "text" else BUNDLE for name in CONFIGS}
        np.savez(SAMPLES, **{name: sampled(place, name) for name, place in places.items()})
    GRAPHS.write_text(json.dumps({**machine(), "sha256": dict(all_hashes())}, indent=1) + "\n")


def check() -> int:
    """How many graphs differ from the stored ones."""
    stored = json.loads(GRAPHS.read_text())["sha256"]
    differing = 0
    for name, found in all_hashes():
        wrong = [what for what, sha256 in found.items() if stored[name][what] != sha256]
        differing += bool(wrong)
        sys.stdout.write(f"{name}: {' and '.join(wrong)} differ\n" if wrong else f"{name}: the same\n")
        sys.stdout.flush()
    return differing


if __name__ == "__main__":
    sys.exit(check() if sys.argv[1:] == ["check"] else main())
