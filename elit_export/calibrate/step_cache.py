"""Fits the change of the residual to the change of the input: the calibration of the cache policy `teacache`.

Trajectories are sampled without a cache. From each step to the next `probe` measures a distance, and the residual
changes by mean|r − r_prev| / mean|r_prev|. TeaCache (arXiv 2411.19108) fits a polynomial to such pairs. Here it must
be monotonic, and its degree is selected by the error on held-out images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from elit_export.arrays import Bools, Float64, HostArray, Int64
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.bundle import recording
from elit_export.bundle.manifest import CacheCalibration, CacheFit, Manifest
from elit_export.bundle.reading import Bundle
from elit_export.errors import CalibrationError
from elit_export.runtime.bank import EngineBank, Slot, without_text
from elit_export.runtime.conditioning import numbered
from elit_export.runtime.options import SamplingOptions
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Request
from elit_export.runtime.sampling import sampling_steps
from elit_export.spec import COEFFICIENTS, LATENTS, Budget, Fit
from elit_export.spec.limits import STEPS, TRAJECTORIES

HELD_OUT_INTERVAL = 4  # every 4th image is held out
GRID = 256  # points at which a fit is checked to be monotonic
Floats = Float64
Measurement = tuple[HostArray, HostArray]  # distance and change of each row of one step


@dataclass(frozen=True)
class Trajectories:
    """The trajectories to sample: `images` of every step count with every guidance at every budget."""

    images: int
    steps: tuple[int, ...]
    budgets: tuple[Budget, ...]
    guidance: tuple[str, ...]
    seed: int
    rows: int  # at most so many images at once

    def __post_init__(self) -> None:
        if self.images < HELD_OUT_INTERVAL:
            raise CalibrationError(f"{self.images} images are too few: every {HELD_OUT_INTERVAL}th is held out")
        if not self.budgets:
            raise CalibrationError("no named budget is covered", "name one that is (--budget)")
        if min(self.steps) < 2:
            raise CalibrationError(f"{min(self.steps)} steps: a change needs at least 2")
        TRAJECTORIES.check(self.images, "images")
        STEPS.check(max(self.steps), "steps")


@dataclass(frozen=True)
class Pairs:
    """One value for each row of each step but the first: `distance`, `change`, and where they were measured."""

    distance: Floats
    change: Floats
    kept: Int64
    steps: Int64
    image: Int64

    def where(self, mask: Bools) -> Pairs:
        return Pairs(*(values[mask] for values in vars(self).values()))

    def __len__(self) -> int:
        return len(self.distance)


# ---------------------------------------------------------------- trajectories


class ProbingEngine(Engine):
    """An engine of one trajectory that also measures distance and change at every step."""

    def __init__(self, engine: Engine, probe: Engine, signal_shape: tuple[int, int]) -> None:
        self._engine, self._probe, self._shape = engine, probe, signal_shape
        self._previous: tuple[Array, HostArray] | None = None  # signal and residual
        self.measurements: list[Measurement] = []

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._engine(inputs)
        residual = to_host(outputs["residual"])
        signal, previous_residual = self._previous or (np.zeros((len(residual), *self._shape), np.float32), None)
        common = {name: array for name, array in inputs.items() if name != LATENTS}
        probed = self._probe({**without_text(common), "signal_prev": signal})
        if previous_residual is not None:
            change = np.abs(residual - previous_residual).mean((1, 2)) / np.abs(previous_residual).mean((1, 2))
            self.measurements.append((to_host(probed["distance"]), change))
        self._previous = probed["signal"], residual
        return outputs

    def close(self) -> None:
        """The engine belongs to the pipeline."""


def sample_pairs(pipeline: Pipeline, trajectories: Trajectories) -> Iterator[Pairs]:
    """Sample each part of each trajectory; yields their pairs, `batch_count` times."""
    batch_count(pipeline, trajectories)  # all are checked before any is sampled
    for request in _requests(pipeline, trajectories):
        for part in request.parts():
            yield _pairs(_probed_steps(pipeline, part), part)


def _pairs(measurements: Sequence[Measurement], part: Request) -> Pairs:
    distance, change = (np.stack(values) for values in zip(*measurements, strict=True))
    images = part.first_image + np.arange(len(part.start))
    image = np.tile(images, distance.shape[1] // len(images))  # guidance repeats the rows
    ones = np.ones(distance.shape, np.int64)
    return Pairs(
        distance=distance.ravel().astype(np.float64),
        change=change.ravel().astype(np.float64),
        kept=(ones * part.schedule[0].kept).ravel(),
        steps=(ones * len(part.schedule)).ravel(),
        image=(ones * image).ravel(),
    )


def batch_count(pipeline: Pipeline, trajectories: Trajectories) -> int:
    """Count the parts of all trajectories; raises as `sample_pairs`."""
    return sum(len(request.part_sizes) for request in _requests(pipeline, trajectories))


def joined(parts: Sequence[Pairs]) -> Pairs:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Pairs(*(np.concatenate(values) for values in columns))


def image_numbers(images: Sequence[int]) -> list[int]:
    """Number the images such that the held-out ones have all labels."""
    return [sum(divmod(image, HELD_OUT_INTERVAL)) for image in images]


def _requests(pipeline: Pipeline, trajectories: Trajectories) -> Iterator[Request]:
    """Make every trajectory, each checked as its turn comes; images start from the same noise in each."""
    if "probe" not in pipeline.bank.cache:
        raise CalibrationError("these engines have no graph `probe`", "build the bundle again")
    conditioning = numbered(pipeline.spec, image_numbers(range(trajectories.images)), pipeline.coverage.text)
    for budget, steps, guidance in product(trajectories.budgets, trajectories.steps, trajectories.guidance):
        options = SamplingOptions(
            steps=steps, sampler="euler", schedule=[budget] * steps, guidance=guidance, seed=trajectories.seed
        )
        request = pipeline.prepared(conditioning, options, trajectories.rows)
        if not request.guidance.one_budget:
            raise CalibrationError(f"guidance {guidance!r}: a calibration samples with guidance none or cfg:SCALE")
        yield request


def _probed_steps(pipeline: Pipeline, request: Request) -> list[Measurement]:
    """Measure one part; the same engine serves all of it."""
    spec, bank = pipeline.spec, pipeline.bank
    slot = bank.slot_for(*next(request.sizes()))
    engine = ProbingEngine(slot.engine, bank.cache["probe"], (spec.tokens, spec.hidden_size))
    probing_bank = EngineBank([Slot(slot.profile, engine)], spec.budgets, bank.precision)
    for _ in sampling_steps(probing_bank, request):
        pass
    return engine.measurements


# ---------------------------------------------------------------- fits


def make_calibration(pairs: Pairs, trajectories: Trajectories, checkpoint_sha256: str) -> CacheCalibration:
    """Fit all budgets together, or each by itself if that halves the error on held-out images.

    Raises CalibrationError if the distance does not predict the change.
    """
    common = fit_pairs(pairs, None)
    own = _own_fits(pairs)
    return CacheCalibration(
        checkpoint_sha256=checkpoint_sha256,
        fits=tuple(own) if own and _overall_error(own) <= common.held_out_error / 2 else (common,),
        images=trajectories.images,
        steps=trajectories.steps,
        budgets=tuple(budget.kept for budget in trajectories.budgets),
        guidance=trajectories.guidance,
        seed=trajectories.seed,
    )


def _own_fits(pairs: Pairs) -> list[CacheFit]:
    """Fit each budget by itself; returns none for a single budget, or if one of them cannot be fitted."""
    budgets = np.unique(pairs.kept).tolist()
    try:
        return [fit_pairs(pairs.where(pairs.kept == kept), kept) for kept in budgets] if len(budgets) > 1 else []
    except CalibrationError:  # the common fit serves that budget too
        return []


def _overall_error(fits: Sequence[CacheFit]) -> float:
    """Compute the root mean square of the held-out errors; every fit has equally many held-out pairs."""
    return float(np.sqrt(np.mean([fit.held_out_error**2 for fit in fits])))


def fit_pairs(pairs: Pairs, kept: int | None) -> CacheFit:
    """Fit the monotonic polynomial with the smallest error on held-out images."""
    if not (np.isfinite(pairs.distance).all() and np.isfinite(pairs.change).all()):
        raise CalibrationError(
            "the engines gave distances or residuals that are not finite", "elit-export verify BUNDLE"
        )
    is_held_out = pairs.image % HELD_OUT_INTERVAL == HELD_OUT_INTERVAL - 1
    used, held_out = pairs.where(~is_held_out), pairs.where(is_held_out)
    low, high = (float(np.float32(end)) for end in (pairs.distance.min(), pairs.distance.max()))
    candidates = [_polynomial(used, degree) for degree in range(1, COEFFICIENTS)]
    rising = [coefficients for coefficients in candidates if _rises(coefficients, low, high)]
    if not rising:
        raise CalibrationError(
            "the residual does not change more where the input changes more, so teacache cannot decide by it",
            "use a cache policy of the family static",
        )
    best = min(rising, key=lambda coefficients: _error(coefficients, held_out))
    return CacheFit(
        kept=kept,
        fit=Fit(tuple(best.tolist()), low, high),
        r2=_r2(best, held_out),
        r2_same_steps=_r2_same_steps(best, held_out),
        rank_same_steps=_rank_same_steps(held_out),
        held_out_error=_error(best, held_out),
        pairs=len(pairs),
    )


def _polynomial(pairs: Pairs, degree: int) -> Floats:
    """Fit by least squares; lowest power first, padded with zeros to COEFFICIENTS."""
    scale = pairs.distance.max()
    powers = np.vander(pairs.distance / scale, degree + 1, increasing=True)
    solution, *_ = np.linalg.lstsq(powers, pairs.change, rcond=None)
    coefficients = np.zeros(COEFFICIENTS)
    coefficients[: degree + 1] = solution / scale ** np.arange(degree + 1)
    return coefficients


def _rises(coefficients: Floats, low: float, high: float) -> bool:
    return bool((np.diff(_values(coefficients, np.linspace(low, high, GRID))) >= 0).all())


def _values(coefficients: Floats, distance: Floats) -> Floats:
    return np.asarray(np.polynomial.polynomial.polyval(distance, coefficients), np.float64)


def _error(coefficients: Floats, pairs: Pairs) -> float:
    return float(np.sqrt(np.mean((_values(coefficients, pairs.distance) - pairs.change) ** 2)))


def _r2(coefficients: Floats, pairs: Pairs) -> float:
    """Compute the share of the change's variance that the fit explains; below 0 where it is worse than the mean."""
    spread = pairs.change.var()
    return 1 - _error(coefficients, pairs) ** 2 / float(spread) if spread else 0.0


def _r2_same_steps(coefficients: Floats, pairs: Pairs) -> float:
    """Compute r² within trajectories of equally many steps: what the distance explains beyond the step size."""
    counts = np.unique(pairs.steps)
    return float(np.mean([_r2(coefficients, pairs.where(pairs.steps == count)) for count in counts]))


def _rank_same_steps(pairs: Pairs) -> float:
    """Compute Spearman's rank correlation of distance and change, averaged over the step counts."""
    same = [pairs.where(pairs.steps == count) for count in np.unique(pairs.steps)]
    ranks = [(np.argsort(np.argsort(part.distance)), np.argsort(np.argsort(part.change))) for part in same]
    return float(np.mean([np.corrcoef(distance, change)[0, 1] for distance, change in ranks]))


# ---------------------------------------------------------------- into the bundle


def record(bundle: Bundle, calibration: CacheCalibration) -> None:
    """Write a calibration into the manifest, replacing an earlier one; raises BundleError if the model changed."""

    def with_calibration(manifest: Manifest) -> Manifest:
        return manifest.model_copy(update={"cache_calibration": calibration})

    recording.record(bundle, calibration.checkpoint_sha256, with_calibration, remedy="calibrate it again")
