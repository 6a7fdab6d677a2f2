"""What a sampling gave: the samples, how it went, and files of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elit_export.arrays import Arrays, Float64, Pixels
from elit_export.bundle.atomic import atomic_write
from elit_export.errors import InputError
from elit_export.runtime.images import grid, to_images, zoom_of
from elit_export.runtime.sampling import Call, StepSummary
from elit_export.spec import DataFacts


@dataclass(frozen=True)
class Timings:
    """Seconds of one sampling: all of it, and the part inside engines."""

    total_s: float
    engines_s: float


@dataclass(frozen=True)
class Sample:
    """A finished sampling: `latents` (B, C, H, W) float64 and how it went, one record a step.

    `part_sizes` are the images of each part that was sampled by itself; of one part they are all.
    """

    latents: Float64
    labels: tuple[int, ...]
    records: tuple[StepSummary, ...]
    timings: Timings
    data: DataFacts
    part_sizes: tuple[int, ...]

    @property
    def images(self) -> Pixels:
        """(B, H, W, C) for pixel models; raises InputError where a VAE decoder is needed: `pipeline.decode`."""
        return to_images(self.latents, self.data)

    @property
    def ms_per_image(self) -> float:
        return self.timings.total_s * 1e3 / len(self.latents)

    @property
    def calls(self) -> list[Call]:
        return [call for record in self.records for call in record.calls]

    def __repr__(self) -> str:
        return f"<Sample: {self.summary()}>"

    def save(self, folder: str | Path, *, pictures: Pixels | None = None, dtype: str = "float32") -> tuple[Path, ...]:
        """Write `samples.npz` and `samples.png` into a folder, as the command line does; gives the files written.

        VAE latents need `pictures`, of `pipeline.decode(sample.latents)`; without them no PNG is written. `dtype` is
        that of the numbers in the `.npz`. Raises InputError or OSError.
        """
        arrays, image = Path(folder) / "samples.npz", Path(folder) / "samples.png"
        save_arrays(self, arrays, dtype)
        if pictures is None and self.data.kind == "pixels":
            pictures = self.images
        if pictures is None:
            return (arrays,)
        save_grid(pictures, image)
        return arrays, image

    def cache_summary(self) -> str:
        """One line: calls that were reused or probed, why the others computed, and how many parts measured."""
        because = Counter(call.cached.because for call in self.calls if not call.reused)
        reasons = ", ".join(f"{count} {reason or 'not cached'}" for reason, count in because.items())
        reused, probes = sum(call.reused for call in self.calls), sum(call.cached.probed for call in self.calls)
        parts = len(self.part_sizes)
        alone = f"; each of {parts} parts decided by itself" if probes and parts > 1 else ""
        return f"{reused} of {len(self.calls)} calls reused after {probes} probes; computed: {reasons}{alone}"

    def summary(self) -> str:
        """One line: images, parts if there are several, steps, engine calls by budget, time."""
        calls = Counter("reused" if call.reused else str(call.budget) for call in self.calls)
        by_budget = ", ".join(f"{count}×{budget}" for budget, count in calls.items())
        parts = (
            f", in {len(self.part_sizes)} parts of at most {max(self.part_sizes)}" if len(self.part_sizes) > 1 else ""
        )
        return (
            f"{len(self.latents)} images in {len(self.records)} steps{parts}, engine calls {by_budget}; "
            f"{self.timings.total_s:.2f} s, {self.ms_per_image:.0f} ms per image, "
            f"{self.timings.engines_s / self.timings.total_s:.0%} in engines"
        )


# ---------------------------------------------------------------- files

DTYPES = "float32", "float64"
COLUMNS = 10  # of a grid


def save_arrays(sample: Sample, path: Path, dtype: str = DTYPES[0]) -> None:
    """Write a `.npz`: the samples (B, C, H, W) as `images`, of a VAE as `latents`, and the labels if there are any."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown", f"choose {' or '.join(DTYPES)}")
    name = "images" if sample.data.kind == "pixels" else "latents"
    arrays: Arrays = {name: sample.latents.astype(dtype)}
    if sample.labels:
        arrays["labels"] = np.asarray(sample.labels)
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # NumPy would add a suffix to a name
        np.savez(file, **arrays)  # type: ignore[arg-type]


def save_grid(pictures: Pixels, path: Path) -> None:
    """Write a PNG, ten to a row; small ones twice as large."""
    rows = [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
    with atomic_write(path) as temporary:
        grid(rows, zoom=zoom_of(pictures, 2)).save(temporary, format="PNG")
