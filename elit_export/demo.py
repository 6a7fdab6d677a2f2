"""The shipped model from checkpoint to pictures: one row of images per budget, one that mixes them.

Takes: an output folder.  Gives: DemoRows and a picture.  May touch: the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elit_export.compile import Progress, compile_bundle
from elit_export.files import written_whole
from elit_export.models.cost import flops_per_image
from elit_export.recipe import shipped_recipe
from elit_export.runtime.images import grid
from elit_export.runtime.pipeline import Pipeline, Sample

STEPS = 15
SAMPLER = "ab3"
SCALE = 2
SEED = 7
ZOOM = 3


@dataclass(frozen=True)
class DemoRow:
    """One row of the picture. `flops_per_image` counts every engine call of the trajectory."""

    name: str
    guidance: str
    sample: Sample
    flops_per_image: float

    @property
    def ms_per_image(self) -> float:
        return self.sample.ms_per_image


def build_demo(folder: Path, progress: Progress) -> Pipeline:
    """Build the shipped recipe's CPU target and open it."""
    compile_bundle(shipped_recipe(), "cpu", out=folder / "bundle", progress=progress)
    return Pipeline.load(folder / "bundle", target="cpu")


def demo_rows(pipeline: Pipeline) -> Iterator[DemoRow]:
    """Every class once at every named budget with CFG, then a mixed schedule with cheap CFG; the same seeds."""
    labels = list(range(pipeline.spec.num_classes))
    lowest = list(pipeline.spec.named_budgets)[-1]
    half = STEPS // 2
    choices = [(name, name, f"cfg:{SCALE}") for name in pipeline.spec.named_budgets]
    mixed = f"0-{half - 1}:quarter,{half}-{STEPS - 1}:full"
    choices.append(("quarter, then full", mixed, f"ccfg:{SCALE}@{lowest}"))
    pipeline.sample(labels, steps=2, guidance=f"cfg:{SCALE}")  # warm up
    for name, schedule, guidance in choices:
        sample = pipeline.sample(labels, steps=STEPS, sampler=SAMPLER, schedule=schedule, guidance=guidance, seed=SEED)
        yield DemoRow(name, guidance, sample, flops_per_image(sample, pipeline.spec))


def save_picture(rows: list[DemoRow], path: Path) -> None:
    picture = grid([row.sample.images for row in rows], zoom=ZOOM)
    with written_whole(path) as temporary:
        picture.save(temporary, optimize=True)
