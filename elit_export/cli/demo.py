"""demo: the shipped model from checkpoint to pictures, one row of images per budget and one that mixes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elit_export.bundle.atomic import atomic_write, check_writable
from elit_export.cli.common import (
    FOLDER,
    JSON_OPTION,
    TRUST_OPTION,
    build_progress,
    progress_bar,
    say,
    show,
    write_json,
)
from elit_export.cli.opened import opened_once
from elit_export.cli.tables.layout import table
from elit_export.cli.tools import naming_the_extra
from elit_export.errors import InputError
from elit_export.spec import listed

if TYPE_CHECKING:
    from elit_export.arrays import Pixels
    from elit_export.bundle.store import Progress
    from elit_export.runtime.coverage import Coverage
    from elit_export.runtime.pipeline import Pipeline
    from elit_export.runtime.sample import Sample
    from elit_export.spec import ModelSpec, SolverFacts

STEPS = 15
SAMPLER = "ab3"
SCALE = 2
SEED = 7
ZOOM = 3
IMAGES = 10  # in a row, if the model has as many classes


@dataclass(frozen=True)
class DemoConfig:
    """The sampling config of one row."""

    name: str
    schedule: str
    guidance: str
    sampler: str = SAMPLER
    steps: int | None = STEPS  # None: those of a solver table


@dataclass(frozen=True)
class DemoRow:
    """One row of the picture. `flops_per_image` counts every engine call of the trajectory."""

    config: DemoConfig
    sample: Sample
    images: Pixels
    flops_per_image: float

    @property
    def ms_per_image(self) -> float:
        return self.sample.ms_per_image


def build_demo(folder: Path, progress: Progress) -> Pipeline:
    """Build the shipped recipe's CPU target and open it; needs torch."""
    from elit_export.bundle.recipe import shipped_recipe
    from elit_export.compiler.build import compile_bundle
    from elit_export.runtime.pipeline import Pipeline

    compile_bundle(shipped_recipe(), "cpu", out=folder / "bundle", progress=progress)
    return Pipeline.load(folder / "bundle", target="cpu")


def open_demo(bundle: Path, *, target: str | None, precision: str | None, trust: bool = False) -> Pipeline:
    """Open a bundle that is already built; raises InputError if it takes text, or no pictures can be made of it."""
    from elit_export.runtime.images import DECODER_REMEDY

    pipeline = opened_once(bundle, target, precision, trust=trust).pipeline
    if pipeline.spec.takes_text:
        pipeline.close()
        raise InputError(
            f"the demo draws classes, and {bundle} takes text",
            f"elit-export sample {bundle} --prompt TEXT --encoder FOLDER, or --prompts FILE.npz",
        )
    if not pipeline.makes_pictures:
        pipeline.close()
        raise InputError(
            f"{bundle} samples latents of a VAE ({pipeline.data.vae or 'unknown'}) and has no decoder to draw them "
            f"with",
            f"{DECODER_REMEDY}, or write them as they are: elit-export sample {bundle}",
        )
    return pipeline


def demo_configs(pipeline: Pipeline) -> list[DemoConfig]:
    """List every named budget that the engines cover, with CFG, a mixed schedule with cheap CFG, and solver tables."""
    names = [name for name, budget in pipeline.spec.named_budgets.items() if budget in pipeline.coverage.covered]
    if not names:
        raise InputError(
            f"no profile covers any of {', '.join(pipeline.spec.named_budgets)}, the budgets of the demo; "
            f"the engines cover {listed(pipeline.coverage.covered)}",
            "elit-export sample BUNDLE --schedule BUDGET",
        )
    configs = [DemoConfig(name, name, f"cfg:{SCALE}") for name in names]
    if len(names) > 1:
        middle, half = "quarter" if "quarter" in names else names[-1], STEPS // 2
        mixed = f"0-{half - 1}:{middle},{half}-{STEPS - 1}:{names[0]}"
        configs.append(DemoConfig(f"{middle}, then {names[0]}", mixed, f"ccfg:{SCALE}@{names[-1]}"))
    return configs + solver_configs(pipeline.spec, pipeline.coverage)


def solver_configs(spec: ModelSpec, coverage: Coverage) -> list[DemoConfig]:
    """List the tables that were calibrated for what the demo samples, and whose budgets the engines cover.

    Of several with one name it is the one that a sampling takes.
    """
    from elit_export.runtime.guidance import Guidance
    from elit_export.runtime.samplers.calibrated import Place

    place = Place.of(Guidance.parse(f"cfg:{SCALE}", spec), "full", spec)
    by_name: dict[str, SolverFacts] = {}
    for facts in coverage.solvers:
        if place.holds(facts, spec):
            by_name.setdefault(facts.name, facts)
    return [
        DemoConfig("mixed" if facts.table.budgets else "full", "full", facts.guidance, name, None)
        for name, facts in by_name.items()
        if kept_by(facts, spec) <= {budget.kept for budget in coverage.covered}
    ]


def kept_by(facts: SolverFacts, spec: ModelSpec) -> set[int]:
    """Return the latents kept in the calls of a table, and those of the full budget, which its reference has."""
    table = facts.table
    return {spec.full.kept, *(table.budgets or ()), *(table.weak_budgets or ())}


def demo_rows(pipeline: Pipeline, configs: list[DemoConfig]) -> Iterator[DemoRow]:
    """Sample the first classes once by each config, from the same seeds."""
    from elit_export.cost.flops import flops_per_image

    labels = list(range(min(IMAGES, pipeline.spec.num_classes)))
    pipeline.sample(labels, steps=2, schedule=configs[0].name, guidance=configs[0].guidance)  # warm up
    for config in configs:
        sample = pipeline.sample(
            labels,
            steps=config.steps,
            sampler=config.sampler,
            schedule=config.schedule,
            guidance=config.guidance,
            seed=SEED,
        )
        images = pipeline.decode(sample.latents)
        yield DemoRow(config, sample, images, flops_per_image(sample, pipeline.spec))


def save_picture(rows: list[DemoRow], path: Path) -> None:
    from elit_export.runtime.images import grid, zoom_of

    picture = grid([row.images for row in rows], zoom=zoom_of(rows[0].images, ZOOM))
    with atomic_write(path) as temporary:
        picture.save(temporary, optimize=True)


# ---------------------------------------------------------------- the command


@click.command()
@click.option("--out", type=FOLDER, default=Path("elit-export-demo"), show_default=True)
@click.option("--bundle", type=FOLDER, help="Draw from this bundle and build nothing; needs no torch.")
@click.option("--target", help="Of --bundle; needed if it has several.")
@click.option("--precision", help="Of --bundle; needed if the target has several.")
@TRUST_OPTION
@JSON_OPTION
def demo(
    out: Path, bundle: Path | None, target: str | None, precision: str | None, trust: bool, json_to: str | None
) -> None:
    """Build the shipped model's engines and draw one picture: a row per budget, and one that mixes them."""
    if bundle is None and (target or precision or trust):
        raise InputError("--target, --precision and --trust are of a bundle", "give --bundle BUNDLE too")
    picture = out / "demo.png"
    check_writable(picture)
    pipeline = open_demo(bundle, target=target, precision=precision, trust=trust) if bundle else built_demo(out)
    with pipeline, progress_bar() as progress:
        configs = demo_configs(pipeline)
        rows = list(progress.track(demo_rows(pipeline, configs), total=len(configs), description="sampling"))
    save_picture(rows, picture)
    show_demo(rows, json_to)
    engines = bundle or out / "bundle"
    say(f"wrote {picture}, one row of images for each row of the table; engines in {engines}", json_to=json_to)


def built_demo(out: Path) -> Pipeline:
    """Raises BackendUnavailable where the libraries of building are not installed."""
    elsewhere = ", or draw from a bundle that was built elsewhere: elit-export demo --bundle BUNDLE"
    with naming_the_extra("building the shipped model", otherwise=elsewhere), progress_bar() as progress:
        return build_demo(out, build_progress(progress))


def show_demo(rows: list[DemoRow], json_to: str | None) -> None:
    full = rows[0]
    facts = [
        {
            "row": row.config.name,
            "sampler": row.config.sampler,
            "steps": len(row.sample.records),
            "guidance": row.config.guidance,
            "ms_per_image": row.ms_per_image,
            "gflop_per_image": row.flops_per_image / 1e9,
        }
        for row in rows
    ]
    cells = [
        (
            row.config.name,
            row.config.sampler,
            str(len(row.sample.records)),
            row.config.guidance,
            f"{row.ms_per_image:.1f}",
            f"{row.ms_per_image / full.ms_per_image:.2f}",
            f"{row.flops_per_image / full.flops_per_image:.2f}",
        )
        for row in rows
    ]
    relative = (f"{what} / {full.config.name}" for what in ("time", "FLOPs"))
    columns = ("budget", "sampler", "steps", "guidance", "ms per image", *relative)
    sizes = full.sample.part_sizes
    title = f"{sum(sizes)} images, at most {max(sizes)} at once"
    show(table(title, columns, cells), json_to=json_to)
    write_json(facts, json_to)
