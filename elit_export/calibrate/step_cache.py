"""How far the change of the input tells the change of the residual: what the cache policy `teacache` decides by.

Trajectories are sampled without a cache. From each step to the next `probe` measures a distance, and the
residual changes by mean|r − r_prev| / mean|r_prev|. TeaCache (arXiv 2411.19108) fits a polynomial to such pairs;
here it must not decrease, and is chosen by the error on images that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from elit_export.arrays import Bools, Float64, HostArray, Int64
from elit_export.backends.protocols import Array, Engine, to_host
from elit_export.bundle.manifest import CacheCalibration, CacheFit
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.errors import BundleError, CalibrationError
from elit_export.runtime.bank import EngineBank, Slot, without_text
from elit_export.runtime.conditioning import numbered
from elit_export.runtime.noise import SeededNoise
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Request
from elit_export.runtime.sampling import sampling_steps
from elit_export.spec import COEFFICIENTS, LATENTS, Budget, Fit

HELD_OUT_EVERY = 4  # of the images
GRID = 256  # points at which a fit must not decrease
Floats = Float64


@dataclass(frozen=True)
class Trajectories:
    """Which trajectories to sample: every step count with every guidance at every budget, `images` of each."""

    images: int
    steps: tuple[int, ...]
    budgets: tuple[Budget, ...]
    guidance: tuple[str, ...]
    seed: int
    rows: int  # images at once

    def __post_init__(self) -> None:
        if self.images < HELD_OUT_EVERY:
            raise CalibrationError(f"{self.images} images are too few: every {HELD_OUT_EVERY}th is held out")
        if not self.budgets:
            raise CalibrationError("no named budget is covered", "name one that is (--budget)")
        if min(self.steps) < 2:
            raise CalibrationError(f"{min(self.steps)} steps: a change needs at least 2")


@dataclass(frozen=True)
class Pairs:
    """One value for each row of each step but the first: `distance` → `change`, and where it was seen."""

    distance: Floats
    change: Floats
    kept: Int64
    steps: Int64
    image: Int64

    def where(self, chosen: Bools) -> Pairs:
        return Pairs(*(values[chosen] for values in vars(self).values()))

    def __len__(self) -> int:
        return len(self.distance)


# ---------------------------------------------------------------- trajectories


class Watched(Engine):
    """An engine of one trajectory that measures, beside what it is asked for, how much it changed."""

    def __init__(self, engine: Engine, probe: Engine, signal_shape: tuple[int, int]) -> None:
        self._engine, self._probe, self._shape = engine, probe, signal_shape
        self._before: tuple[Array, HostArray] | None = None  # signal and residual
        self.seen: list[tuple[HostArray, HostArray]] = []  # distance and change of each row, step by step

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._engine(inputs)
        residual = to_host(outputs["residual"])
        signal, old = self._before or (np.zeros((len(residual), *self._shape), np.float32), None)
        common = {name: array for name, array in inputs.items() if name != LATENTS}
        probed = self._probe({**without_text(common), "signal_prev": signal})
        if old is not None:
            change = np.abs(residual - old).mean((1, 2)) / np.abs(old).mean((1, 2))
            self.seen.append((to_host(probed["distance"]), change))
        self._before = probed["signal"], residual
        return outputs

    def close(self) -> None:
        """The engine belongs to the pipeline."""


def sampled_pairs(pipeline: Pipeline, wanted: Trajectories) -> Iterator[Pairs]:
    """The pairs of one trajectory of `wanted.rows` images after another; `batches(wanted)` of them."""
    spec = pipeline.spec
    noise = SeededNoise(wanted.seed, wanted.images, spec.sample_shape)()  # image i depends on (seed, i) alone
    kinds = list(product(wanted.budgets, wanted.steps, wanted.guidance))
    batches_of = [
        range(start, min(start + wanted.rows, wanted.images)) for start in range(0, wanted.images, wanted.rows)
    ]
    for budget, steps, guidance in kinds:  # checked before any is sampled; only the last is smaller
        for images in (batches_of[0], batches_of[-1]):
            _request(pipeline, images, budget, steps, guidance)
    for budget, steps, guidance in kinds:
        for images in batches_of:
            seen = _watched_steps(pipeline, images, noise[images.start : images.stop], budget, steps, guidance)
            distance, change = np.stack([step[0] for step in seen]), np.stack([step[1] for step in seen])
            image = np.tile(np.asarray(images), distance.shape[1] // len(images))  # guidance repeats the rows
            whole = np.ones(distance.shape, np.int64)
            yield Pairs(
                distance=distance.ravel().astype(np.float64),
                change=change.ravel().astype(np.float64),
                kept=(whole * budget.kept).ravel(),
                steps=(whole * steps).ravel(),
                image=(whole * image).ravel(),
            )


def batches(wanted: Trajectories) -> int:
    each = -(-wanted.images // wanted.rows)
    return each * len(wanted.budgets) * len(wanted.steps) * len(wanted.guidance)


def joined(parts: Sequence[Pairs]) -> Pairs:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Pairs(*(np.concatenate(values) for values in columns))


def numbers_of(images: Sequence[int]) -> list[int]:
    """A number for each image, such that those held out have all labels."""
    return [sum(divmod(image, HELD_OUT_EVERY)) for image in images]


def _request(
    pipeline: Pipeline, images: Sequence[int], budget: Budget, steps: int, guidance: str, **more: npt.ArrayLike
) -> tuple[Request, Slot]:
    """A checked trajectory, and the engine that serves all of it."""
    if "probe" not in pipeline.bank.cache:
        raise CalibrationError("these engines have no graph `probe`", "build the bundle again")
    request = pipeline.request(
        numbered(pipeline.spec, numbers_of(images), pipeline.coverage.text),
        steps=steps,
        sampler="euler",
        schedule=[budget] * steps,
        guidance=guidance,
        **more,  # type: ignore[arg-type]
    )
    if not request.guidance.one_budget:
        raise CalibrationError(f"guidance {guidance!r}: a calibration samples with guidance none or cfg:SCALE")
    return request, pipeline.bank.slot_for(*request.sizes[0])


def _watched_steps(
    pipeline: Pipeline, images: Sequence[int], noise: Floats, budget: Budget, steps: int, guidance: str
) -> list[tuple[HostArray, HostArray]]:
    spec, bank = pipeline.spec, pipeline.bank
    request, slot = _request(pipeline, images, budget, steps, guidance, noise=noise)
    watched = Watched(slot.engine, bank.cache["probe"], (spec.tokens, spec.hidden_size))
    alone = EngineBank([Slot(slot.profile, watched)], spec.budgets, bank.precision)
    for _ in sampling_steps(alone, request):
        pass
    return watched.seen


# ---------------------------------------------------------------- fits


def calibrated(pairs: Pairs, wanted: Trajectories, checkpoint_sha256: str) -> CacheCalibration:
    """One fit for all budgets, or one for each if that halves the error on held-out images.

    Raises CalibrationError if the distance does not tell the change.
    """
    common = fitted(pairs, None)
    own = _own_fits(pairs)
    return CacheCalibration(
        checkpoint_sha256=checkpoint_sha256,
        fits=tuple(own) if own and _overall_error(own) <= common.held_out_error / 2 else (common,),
        images=wanted.images,
        steps=wanted.steps,
        budgets=tuple(budget.kept for budget in wanted.budgets),
        guidance=wanted.guidance,
        seed=wanted.seed,
    )


def _own_fits(pairs: Pairs) -> list[CacheFit]:
    """One for each budget; none if there is one budget only, or one that cannot be fitted."""
    budgets = np.unique(pairs.kept).tolist()
    try:
        return [fitted(pairs.where(pairs.kept == kept), kept) for kept in budgets] if len(budgets) > 1 else []
    except CalibrationError:  # the common fit serves that budget too
        return []


def _overall_error(fits: Sequence[CacheFit]) -> float:
    """Root mean square over what all of them held out, of which each has the same share."""
    return float(np.sqrt(np.mean([fit.held_out_error**2 for fit in fits])))


def fitted(pairs: Pairs, kept: int | None) -> CacheFit:
    """The polynomial, of those that do not decrease, with the least error on held-out images."""
    if not (np.isfinite(pairs.distance).all() and np.isfinite(pairs.change).all()):
        raise CalibrationError(
            "the engines gave distances or residuals that are not finite", "elit-export verify BUNDLE"
        )
    is_held_out = pairs.image % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    known, unknown = pairs.where(~is_held_out), pairs.where(is_held_out)
    low, high = (float(np.float32(end)) for end in (pairs.distance.min(), pairs.distance.max()))
    found = [_polynomial(known, degree) for degree in range(1, COEFFICIENTS)]
    rising = [coefficients for coefficients in found if _rises(coefficients, low, high)]
    if not rising:
        raise CalibrationError(
            "the residual does not change more where the input changes more, so teacache cannot decide by it",
            "use a cache policy of the family static",
        )
    best = min(rising, key=lambda coefficients: _error(coefficients, unknown))
    return CacheFit(
        kept=kept,
        fit=Fit(tuple(best.tolist()), low, high),
        r2=_r2(best, unknown),
        r2_same_steps=_r2_same_steps(best, unknown),
        rank_same_steps=_rank_same_steps(unknown),
        held_out_error=_error(best, unknown),
        pairs=len(pairs),
    )


def _polynomial(pairs: Pairs, degree: int) -> Floats:
    """Least squares, lowest power first, as many coefficients as any fit has."""
    scale = pairs.distance.max()
    powers = np.vander(pairs.distance / scale, degree + 1, increasing=True)
    found, *_ = np.linalg.lstsq(powers, pairs.change, rcond=None)
    coefficients = np.zeros(COEFFICIENTS)
    coefficients[: degree + 1] = found / scale ** np.arange(degree + 1)
    return coefficients


def _rises(coefficients: Floats, low: float, high: float) -> bool:
    return bool((np.diff(_values(coefficients, np.linspace(low, high, GRID))) >= 0).all())


def _values(coefficients: Floats, distance: Floats) -> Floats:
    return np.asarray(np.polynomial.polynomial.polyval(distance, coefficients), np.float64)


def _error(coefficients: Floats, pairs: Pairs) -> float:
    return float(np.sqrt(np.mean((_values(coefficients, pairs.distance) - pairs.change) ** 2)))


def _r2(coefficients: Floats, pairs: Pairs) -> float:
    """Share of the change's variance that the fit explains; below 0 where it is worse than the mean."""
    spread = pairs.change.var()
    return 1 - _error(coefficients, pairs) ** 2 / float(spread) if spread else 0.0


def _r2_same_steps(coefficients: Floats, pairs: Pairs) -> float:
    """The same within trajectories of equally many steps: what the distance tells beyond the size of a step."""
    counts = np.unique(pairs.steps)
    return float(np.mean([_r2(coefficients, pairs.where(pairs.steps == count)) for count in counts]))


def _rank_same_steps(pairs: Pairs) -> float:
    """Spearman's rank correlation of distance and change, averaged over the step counts."""
    same = [pairs.where(pairs.steps == count) for count in np.unique(pairs.steps)]
    ranks = [(np.argsort(np.argsort(part.distance)), np.argsort(np.argsort(part.change))) for part in same]
    return float(np.mean([np.corrcoef(distance, change)[0, 1] for distance, change in ranks]))


# ---------------------------------------------------------------- into the bundle


def record(bundle: Bundle, calibration: CacheCalibration) -> None:
    """Write it into the manifest, in place of an earlier one; raises BundleError if the model changed meanwhile."""
    with writing(bundle.folder) as store:
        manifest = store.manifest  # a target may have been built meanwhile
        if manifest is None or manifest.model.checkpoint_sha256 != calibration.checkpoint_sha256:
            raise BundleError(f"{bundle.folder} was built from another checkpoint meanwhile", "calibrate it again")
        store.commit(manifest.model_copy(update={"cache_calibration": calibration}))
