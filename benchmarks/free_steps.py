"""The error of samplers at equal engine calls, and of changes to them that cost no call.

    python benchmarks/free_steps.py build/demo/bundle [--images 32] [--guidance cfg:2] [--json FILE]

Against 160 steps of `ab3` from the same noise, at the full budget: SQNR in dB of all images together, of the median
image and of the worst.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from elit_export import Pipeline
from elit_export.arrays import Float64
from elit_export.bundle.atomic import write_text
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.samplers import SAMPLERS
from elit_export.runtime.samplers.adams_bashforth import integration_weights, weighted
from elit_export.runtime.samplers.base import Noise, Run, Sampler, Velocity
from elit_export.runtime.samplers.unipc import unipc
from elit_export.verify.metrics import sample_error

REFERENCE = SamplingOptions(sampler="ab3", steps=160)
CALLS = (5, 6, 8, 10, 14)

# ---------------------------------------------------------------- variants that the package does not offer


def adams(predictor: int, corrector: int) -> Run:
    """Adams–Bashforth of order `predictor` from a first step by Euler; 0: no corrector."""

    def run(velocity: Velocity, x: Float64, times: Float64, _noise: Noise) -> Iterator[Float64]:
        history: list[Float64] = []
        before = x
        for step in range(len(times) - 1):
            history, known = [velocity(x, times[step], step, 0), *history[:7]], times[step::-1]
            if step > 0 and corrector:  # the last step again, with the velocity at its end
                before = before + weighted(
                    history[:corrector], integration_weights(known[:corrector], known[1], known[0])
                )
            else:
                before = x
            x = before + weighted(
                history[:predictor], integration_weights(known[:predictor], known[0], times[step + 1])
            )
            yield x

    return run


def first_step_of(share: float) -> Callable[[int], Float64]:
    """Even steps but for the first, which is `share` of the others."""

    def times(steps: int) -> Float64:
        return np.append(1.0, np.arange(steps - 1, -1, -1) / (steps - 1 + share))

    return times


def tiny_first_step(steps: int) -> Float64:
    return np.append(1.0, np.linspace(1 - 1e-3, 0, steps))


TRIED = {
    **{name: SAMPLERS[name] for name in ("euler", "heun", "ab2", "ab3", "abm3", "unipc")},
    "ab3 from Euler": Sampler("", adams(3, 0), accuracy=2),
    "ab3 from Euler, steps of abm3": Sampler("", adams(3, 0), accuracy=2, times=SAMPLERS["abm3"].times),
    "ab3 corrected to 4, steps of abm3": Sampler("", adams(3, 4), accuracy=3, times=SAMPLERS["abm3"].times),
    "ab3 from Euler, first step 0.001": Sampler("", adams(3, 0), accuracy=3, times=tiny_first_step),
    "ab3 from Euler, first step half": Sampler("", adams(3, 0), accuracy=3, times=first_step_of(0.5)),
    "ab2 corrected to 3, even steps": Sampler("", adams(2, 3), accuracy=3),
    "ab3 corrected to 3": Sampler("", adams(3, 3), accuracy=3),
    "ab3 corrected to 4": Sampler("", adams(3, 4), accuracy=3),
    "unipc of order 3": Sampler("", unipc(3), accuracy=2),
}

# ---------------------------------------------------------------- measuring


def sampled(pipeline: Pipeline, labels: list[int], options: SamplingOptions, sampler: Sampler, steps: int) -> Float64:
    request = pipeline.prepared(labels, replace(options, sampler="euler", steps=steps))
    return pipeline.run(replace(request, sampler=sampler, times=sampler.times(steps))).latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--guidance", default="cfg:2")
    parser.add_argument("--seed", type=int, default=9000)
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS)
    parser.add_argument("--samplers", nargs="+", default=list(TRIED), choices=TRIED)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with Pipeline.load(options.bundle) as pipeline:
        labels = [image % pipeline.spec.num_classes for image in range(options.images)]
        sampling = replace(REFERENCE, guidance=options.guidance, seed=options.seed)
        expected = pipeline.sampled(labels, sampling).latents
        for name in options.samplers:
            for calls in options.calls:
                if steps := TRIED[name].steps_within(calls):
                    found = sampled(pipeline, labels, sampling, TRIED[name], steps)
                    error = asdict(sample_error(found, expected))
                    rows.append({"name": name, "calls": TRIED[name].calls(steps), **error})
                    print(json.dumps(rows[-1]), flush=True)
    if options.json:
        write_text(options.json, json.dumps(rows))


if __name__ == "__main__":
    main()
