"""Memory and time of exporting a large text-to-image model, or asking PyTorch, without ever holding its weights twice.

    python benchmarks/export_size.py --billions 2 --precision bf16
    python benchmarks/export_size.py --billions 2 --what answer

Makes random bf16 weights of an ELIT-MM-DiT of Qwen-Image's form with about so many parameters: a folder as diffusers
writes it, shard by shard, and a file with Read and Write. Exports `step` from them in a process of its own, or has
PyTorch answer one call of it in float32 there, as a build does for its reference, and holds that process's peak of
resident memory, mapped files included, against the weights as stored. Removes all it wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from elit_export.checkpoints.diffusers import (
    CLASS_NAME,
    CONFIG,
    INDEX,
    INTERFACE,
    INTERFACE_FORMAT,
    config_of,
    diffusers_name,
)
from elit_export.checkpoints.native import stored_checkpoint
from elit_export.checkpoints.weights import meta_model, spec_to_metadata
from elit_export.graphs.export import export_graph
from elit_export.models.elit import Elit
from elit_export.models.registry import named_spec
from elit_export.models.upcast import upcast_on_use
from elit_export.spec import STEP, DataFacts, ModelSpec, Precision

NAME = "ELIT-Qwen-Image"
SIDE = 1024  # pixels
TEXT = 128  # tokens of the call that PyTorch answers
MOST_RATIO = 1.3
HEAD_SIZE = 128
SCALE = 0.02
STORED = torch.bfloat16
SAMPLED_S = 0.02  # between two looks at the exporting process
GIGABYTE = 1e9


def main() -> None:
    match sys.argv[1:]:
        case ["export", base, interface, out, precision]:
            export(Path(base), Path(interface), Path(out), Precision(precision))
        case ["answer", base, interface, *_]:
            answer(Path(base), Path(interface))
        case _:
            compare()


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--billions", type=float, default=2, help="parameters, about; far fewer miss the bar")
    parser.add_argument("--what", choices=["export", "answer"], default="export")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="bf16")
    parser.add_argument("--folder", type=Path, help="where weights and graph lie meanwhile (twice the weights)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = measure(spec_of(arguments.billions * 1e9), Path(folder), arguments.precision, arguments.what)
    print(measured)
    if arguments.json:
        facts = asdict(measured) | {"ratio": measured.ratio, "anonymous_ratio": measured.anonymous_ratio}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if measured.ratio > MOST_RATIO:
        sys.exit(f"above {MOST_RATIO}")


# ---------------------------------------------------------------- weights


def spec_of(parameters: float) -> ModelSpec:
    """36 · width² parameters a block: the widest model of at least 12 blocks, as 2/15 of them in head and tail each."""
    heads = 1
    while 12 * 36 * ((heads + 1) * HEAD_SIZE) ** 2 <= parameters:
        heads += 1
    depth = max(12, round(parameters / (36 * (heads * HEAD_SIZE) ** 2)))
    ends = max(1, round(depth * 2 / 15))
    return replace(
        named_spec(NAME, resolution=SIDE),
        hidden_size=heads * HEAD_SIZE,
        num_heads=heads,
        head_depth=ends,
        core_depth=depth - 2 * ends,
        tail_depth=ends,
    )


def write_weights(spec: ModelSpec, folder: Path) -> tuple[Path, Path, int]:
    """The folder, the file of Read and Write, and the number of parameters."""
    model = meta_model(spec, DataFacts(kind="vae", vae="unknown"))
    base, interface = folder / "transformer", folder / "interface.safetensors"
    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    added = {name: shape for name, shape in shapes.items() if name.startswith(INTERFACE)}
    save_file(random(added, generator), interface, {"format": INTERFACE_FORMAT, **spec_to_metadata(model)})
    index: dict[str, str] = {}
    for number, shard in enumerate(shards(model)):
        name = f"diffusion_pytorch_model-{number:05d}.safetensors"
        save_file(random({diffusers_name(own, spec): shapes[own] for own in shard}, generator), base / name)
        index |= {diffusers_name(own, spec): name for own in shard}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (base / CONFIG).write_text(json.dumps({"_class_name": CLASS_NAME, **config_of(spec)}))
    return base, interface, sum(torch.Size(shape).numel() for shape in shapes.values())


def shards(model: Elit) -> Iterator[list[str]]:
    """The names of the tensors of each block, and of all that lies around blocks."""
    found: dict[str, list[str]] = {}
    for name in model.state_dict():
        if not name.startswith(INTERFACE):
            block = re.match(r"(?:head|core|tail)\.\d+\.", name)
            found.setdefault(block[0] if block else "", []).append(name)
    yield from found.values()


def random(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=STORED).normal_(std=SCALE, generator=generator) for name, shape in shapes.items()
    }


# ---------------------------------------------------------------- the export


@dataclass(frozen=True)
class Measured:
    """`anonymous` is memory that cannot be dropped and read again, mapped files left out."""

    width: int
    depth: int
    parameters: int
    precision: str
    stored_bytes: int
    graph_bytes: int
    baseline_bytes: int
    peak_bytes: int
    baseline_anonymous_bytes: int
    peak_anonymous_bytes: int
    seconds: float

    @property
    def ratio(self) -> float:
        """The peak above the baseline over the weights as stored, which are no more than those of the graph."""
        return (self.peak_bytes - self.baseline_bytes) / self.stored_bytes

    @property
    def anonymous_ratio(self) -> float:
        return (self.peak_anonymous_bytes - self.baseline_anonymous_bytes) / self.stored_bytes

    @property
    def _made(self) -> str:
        return f", graph in {self.precision} {self.graph_bytes / GIGABYTE:.2f} GB" if self.graph_bytes else ""

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e9:.2f} B parameters (width {self.width}, {self.depth} blocks), stored in "
            f"{self.stored_bytes / GIGABYTE:.2f} GB{self._made}\n"
            f"resident: baseline {self.baseline_bytes / GIGABYTE:.2f} GB, peak {self.peak_bytes / GIGABYTE:.2f} GB, "
            f"{self.ratio:.2f} of the stored weights above the baseline (at most {MOST_RATIO})\n"
            f"without mapped files: baseline {self.baseline_anonymous_bytes / GIGABYTE:.2f} GB, peak "
            f"{self.peak_anonymous_bytes / GIGABYTE:.2f} GB, {self.anonymous_ratio:.2f} above the baseline\n"
            f"{self.seconds:.0f} s"
        )


def measure(spec: ModelSpec, folder: Path, precision: str, what: str) -> Measured:
    base, interface, parameters = write_weights(spec, folder)
    out = folder / "graph"
    started = time.perf_counter()
    command = [sys.executable, __file__, what, str(base), str(interface), str(out), precision]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        before = resident(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        most, most_anonymous = watched(child)
    if child.returncode:
        sys.exit(f"the {what} failed with status {child.returncode}")
    return Measured(
        width=spec.hidden_size,
        depth=spec.depth,
        parameters=parameters,
        precision=precision,
        stored_bytes=sum(file.stat().st_size for file in (interface, *base.glob("*.safetensors"))),
        graph_bytes=(out / f"{STEP}.onnx.data").stat().st_size if what == "export" else 0,
        baseline_bytes=before["VmRSS"],
        peak_bytes=most,
        baseline_anonymous_bytes=anonymous_of(before),
        peak_anonymous_bytes=most_anonymous,
        seconds=time.perf_counter() - started,
    )


def watched(child: subprocess.Popen[str]) -> tuple[int, int]:
    """The kernel's own peak of resident memory, and the largest of many looks at what of it is no mapped file."""
    most = most_anonymous = 0
    while child.poll() is None:
        now = resident(child.pid)
        most = max(most, now.get("VmHWM", 0))  # a process that has just ended has no memory
        most_anonymous = max(most_anonymous, anonymous_of(now))
        time.sleep(SAMPLED_S)
    return most, most_anonymous


def resident(pid: int) -> dict[str, int]:
    found = re.findall(r"(VmHWM|VmRSS|RssAnon|RssShmem):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return {name: 1024 * int(kilobytes) for name, kilobytes in found}


def anonymous_of(memory: dict[str, int]) -> int:
    return memory.get("RssAnon", 0) + memory.get("RssShmem", 0)


def export(base: Path, interface: Path, out: Path, precision: Precision) -> None:
    """In the process that is watched: everything is imported, nothing read."""
    print("ready", flush=True)
    sys.stdin.readline()
    export_graph(stored_checkpoint(base, interface=interface), STEP, out, precision)


def answer(base: Path, interface: Path) -> None:
    """The same, at the smallest budget: all weights are read once, as for any."""
    print("ready", flush=True)
    sys.stdin.readline()
    model = upcast_on_use(stored_checkpoint(base, interface=interface))
    spec = model.spec
    inputs = (torch.zeros(1, *spec.sample_shape), torch.zeros(1), torch.ones(1, TEXT, spec.text_width))
    with torch.inference_mode():
        model.step(*inputs, torch.ones(1, TEXT, dtype=torch.int64), torch.arange(1))


if __name__ == "__main__":
    main()
