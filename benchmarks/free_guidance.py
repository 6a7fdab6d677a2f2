"""What guidance by other rules, and in an interval of t, does to the quality of images: no engine call more than cfg.

    python benchmarks/free_guidance.py build/demo/bundle [--images 256] [--sampler abm3] [--steps 8] [--json FILE]

Each row samples the same labels from the same noise at the full budget. The shipped classifier judges them as
`elit-export evaluate` does; changes are to `cfg` at the same scale, paired. With --json, rows that FILE holds are not
measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elit_export import Pipeline
from elit_export.bundle.atomic import write_text
from elit_export.evaluate.evaluator import load_evaluator
from elit_export.evaluate.paired import Judge, Judged
from elit_export.runtime.guidance import Guidance, Kind
from elit_export.runtime.images import to_images
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.samplers import SAMPLERS
from elit_export.runtime.samplers.base import Noise, Sampler, Velocity

Array = npt.NDArray[np.float64]
Rule = Callable[[Array, float, Array, Array, float], Array]  # (x, t, strong, weak, scale) → velocity
CLASSIFIER = "shipped:fashion_classifier"
INTERVALS = ((0.0, 0.999), (0.0, 0.9), (0.0, 0.75), (0.0, 0.5), (0.25, 1.0))
SMALLER_SCALES = (1.75, 1.5, 1.25)

# ---------------------------------------------------------------- rules, over arrays (B, C, H, W)


def dot(one: Array, other: Array) -> Array:  # (B, 1, 1, 1)
    return np.asarray((one * other).sum(axis=(1, 2, 3), keepdims=True))


def cfg(_x: Array, _t: float, strong: Array, weak: Array, scale: float) -> Array:
    return weak + scale * (strong - weak)


def scaled(smaller: float) -> Rule:
    """CFG at another scale than the row's."""
    return lambda x, t, strong, weak, _scale: cfg(x, t, strong, weak, smaller)


def zero_star(_x: Array, _t: float, strong: Array, weak: Array, scale: float) -> Array:
    """CFG-Zero* (arXiv 2503.18886): the weak velocity, scaled to be as near as it can to the strong one."""
    weak = weak * dot(strong, weak) / dot(weak, weak)
    return weak + scale * (strong - weak)


def projected(strong: Array, weak: Array, scale: float, *, eta: float, radius: float) -> Array:
    """APG (arXiv 2410.02416) without momentum: of the difference, `eta` times what is parallel to `strong`."""
    change = strong - weak
    change = change * np.minimum(1, radius / np.sqrt(dot(change, change)))
    parallel = strong * dot(change, strong) / dot(strong, strong)
    return strong + (scale - 1) * (change - parallel + eta * parallel)


def apg(eta: float = 0.0, radius: float = math.inf) -> Rule:
    """Of velocities."""
    return lambda _x, _t, strong, weak, scale: projected(strong, weak, scale, eta=eta, radius=radius)


def apg_of_data(eta: float = 0.0, radius: float = math.inf) -> Rule:
    """Of predictions of the data, x − t·v, as in the paper."""

    def rule(x: Array, t: float, strong: Array, weak: Array, scale: float) -> Array:
        data = projected(x - t * strong, x - t * weak, scale, eta=eta, radius=radius)
        return (x - data) / t

    return rule


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Case:
    """A way to guide. `skips`: the first step leaves x as it is."""

    name: str
    scale: float
    rule: Rule
    interval: tuple[float, float] = (0.0, 1.0)
    skips: bool = False


def cases(scales: Sequence[float]) -> Iterator[Case]:
    """At each scale first cfg, with which the others are compared; the smaller scales show what less guidance does."""
    for scale in scales:
        yield Case("cfg", scale, cfg)
        yield from rules(scale)
        for interval in INTERVALS:
            yield Case(f"cfg in {interval[0]} {interval[1]}", scale, cfg, interval)
    yield Case("CFG-Zero*, first step skipped", scales[0], zero_star, skips=True)
    for smaller in SMALLER_SCALES:
        yield Case(f"cfg:{smaller}", scales[0], scaled(smaller))


def rules(scale: float) -> Iterator[Case]:
    yield Case("CFG-Zero*", scale, zero_star)
    yield Case("CFG-Zero*, first evaluation unguided", scale, zero_star, (0.0, 0.999))
    yield Case("APG of velocities, eta 0", scale, apg())
    yield Case("APG of data, eta 0", scale, apg_of_data())
    yield Case("APG of data, eta 0, radius 4", scale, apg_of_data(radius=4))
    yield Case("APG of data, eta 1, radius 4", scale, apg_of_data(eta=1, radius=4))


class Pair(Guidance):
    """CFG that hands over both velocities, (2, B, C, H, W), or one where it is not active."""

    def combine(self, velocities: Sequence[npt.NDArray[np.float32]], *, patch: int) -> Array:  # noqa: ARG002
        return np.stack(velocities).astype(np.float64)


def ruled(sampler: Sampler, case: Case) -> Sampler:
    """Return the sampler with the velocities of `Pair` combined by the rule."""

    def run(velocity: Velocity, x: Array, times: Array, noise: Noise) -> Iterator[Array]:
        def combined(x: Array, t: float, step: int, stage: int) -> Array:
            velocities = velocity(x, t, step + case.skips, stage)
            return velocities[0] if len(velocities) == 1 else case.rule(x, t, *velocities, case.scale)

        if case.skips:
            yield x.copy()
        yield from sampler.run(combined, x, times[1:] if case.skips else times, noise)

    return replace(sampler, run=run)


@dataclass(frozen=True)
class Look:
    """What the evaluator says of the images of a case, and the engine rows that each of them took."""

    rows: int
    judged: Judged

    @classmethod
    def read(cls, values: dict[str, Any]) -> Look:
        is_right, resampled = (np.array(values[name]) for name in ("is_right", "resampled"))
        return cls(values["rows"], Judged(is_right, values["distance"], resampled))

    def written(self) -> dict[str, Any]:
        arrays = {name: getattr(self.judged, name).tolist() for name in ("is_right", "resampled")}
        return {"rows": self.rows, "distance": self.judged.distance, **arrays}


def look(pipeline: Pipeline, judge: Judge, case: Case, labels: list[int], sampler: Sampler, steps: int) -> Look:
    pair = Pair(Kind.CFG, case.scale, None, *case.interval)
    options = SamplingOptions(steps=steps, guidance=pair, sampler=sampler.name)
    sample = pipeline.run(replace(pipeline.prepared(labels, options), sampler=ruled(sampler, case)))
    pixels = np.ascontiguousarray(to_images(sample.latents, pipeline.data).transpose(0, 3, 1, 2))
    rows = sum(call.rows for record in sample.records for call in record.calls)
    return Look(rows // len(labels), judge.judged(pixels))


def row_of(case: Case, found: Look, plain: Look) -> dict[str, Any]:
    estimates = {
        "agreement": found.judged.agreement,
        "agreement_change": found.judged.agreement_change(plain.judged),
        "frechet": found.judged.frechet,
        "frechet_change": found.judged.frechet_change(plain.judged),
    }
    numbers = {name: asdict(estimate) for name, estimate in estimates.items()}
    return {"name": case.name, "scale": case.scale, "rows_per_image": found.rows, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--sampler", default="abm3", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--scales", type=float, nargs="+", default=(2.0, 4.0))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    evaluator, sampler = load_evaluator(CLASSIFIER), SAMPLERS[options.sampler]
    labels = np.arange(options.images) % evaluator.facts.spec.num_classes
    judge = Judge(evaluator, labels, seed=0)
    looks: dict[str, Any] = {}
    if options.json and options.json.exists():
        looks = json.loads(options.json.read_text("utf-8"))["looks"]
    plain: dict[float, Look] = {}
    rows = []
    with Pipeline.load(options.bundle) as pipeline:
        for case in cases(options.scales):
            key = f"{case.name}, {case.scale}, {options.images} images, {sampler.name} {options.steps}"
            if key not in looks:
                looks[key] = look(pipeline, judge, case, labels.tolist(), sampler, options.steps).written()
            found = Look.read(looks[key])
            rows.append(row_of(case, found, plain.setdefault(case.scale, found)))
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                write_text(options.json, json.dumps({"rows": rows, "looks": looks}))


if __name__ == "__main__":
    main()
