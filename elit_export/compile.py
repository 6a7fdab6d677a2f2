"""Checkpoint → bundle: the one place that joins graphs, build, verify and bundle.

Takes: a recipe and a target.  Gives: a Bundle whose every profile was compared with PyTorch.
May touch: the output folder.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from elit_export.backends import BACKENDS
from elit_export.build.plan import BuiltPlan
from elit_export.bundle import (
    SCHEMA,
    Artifact,
    Bundle,
    BundleWriter,
    Manifest,
    ModelFacts,
    Parity,
    PlanSet,
    ProfileFacts,
    Reference,
    writing,
)
from elit_export.checkpoint import checkpoint_path, load_checkpoint
from elit_export.errors import RecipeError
from elit_export.files import sha256_of
from elit_export.graphs.export import export_step
from elit_export.models.sit import ElitSiT
from elit_export.recipe import Recipe, Target, load_recipe
from elit_export.runtime.pipeline import open_bank
from elit_export.spec import Profile
from elit_export.verify.cases import REFERENCE_FILE, reference_cases, reference_trajectories
from elit_export.verify.parity import Comparison, compared, comparisons_of, load_reference, parity_of, require
from elit_export.verify.reference import reference_arrays

NOT_RUN = Parity(status="not run", reason="being built")
Progress = Callable[[str, float], None]


def no_progress(_stage: str, _share: float) -> None:
    """Say nothing."""


def compile_bundle(
    recipe: str | Path | Recipe,
    target: str,
    *,
    out: str | Path,
    checkpoint: str | Path | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Export, build, verify, and only then make the bundle in `out` real.

    `checkpoint` takes the place of the recipe's. `progress` hears each stage and the share done
    before it. Plan sets of other targets stay if they were built from the same checkpoint. Raises
    the package's errors; a failed or interrupted build leaves an earlier bundle as it was.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    chosen = recipe.target(target)
    source = checkpoint or recipe.checkpoint
    if source is None:
        raise RecipeError(f"recipe {recipe.name} names no checkpoint: give one (--checkpoint FILE)")
    backend = BACKENDS[chosen.backend].builder()
    with writing(Path(out)) as writer:
        progress("read checkpoint", 0.0)
        model = load_checkpoint(source, **recipe.architecture.model_dump())
        facts = ModelFacts(
            name=recipe.name,
            spec=model.spec,
            data=model.data,
            checkpoint_sha256=sha256_of(checkpoint_path(source)),
        )
        profiles = recipe.profiles_for(model.spec)
        progress("export graph", 0.1)
        graph = _exported(writer, model)
        progress("build plan", 0.5)
        graph_file = writer.folder / graph.kind / graph.name / "step.onnx"
        built = _built(writer, backend.build_plans, graph_file, profiles, chosen, target)
        progress("PyTorch reference", 0.6)
        reference = _referenced(writer, model, profiles)
        plan_set = _plan_set(target, chosen, built, reference)
        draft = _manifest(writer, facts, graph, plan_set)
        verified = _verified(Bundle(writer.folder, draft), plan_set, progress)
        return writer.commit(_manifest(writer, facts, graph, verified))


# ---------------------------------------------------------------- stages


def _exported(writer: BundleWriter, model: ElitSiT) -> Artifact:
    with writer.staged() as folder:
        export_step(model, folder)
        return writer.adopt(folder, "graphs", "step-fp32")


def _built(
    writer: BundleWriter,
    build_plans: Callable[..., list[BuiltPlan]],
    graph: Path,
    profiles: tuple[Profile, ...],
    target: Target,
    name: str,
) -> list[tuple[BuiltPlan, Artifact]]:
    with writer.staged() as folder:
        prefix = f"step-{target.backend}-{name}-{target.precision.value}"
        return [
            (plan, writer.adopt(plan.folder, "plans", prefix)) for plan in build_plans(graph, folder, profiles, target)
        ]


def _referenced(writer: BundleWriter, model: ElitSiT, profiles: tuple[Profile, ...]) -> Reference:
    cases = reference_cases(profiles)
    trajectories = reference_trajectories(profiles, model.spec)
    arrays = reference_arrays(model, cases, trajectories)
    with writer.staged() as folder:
        np.savez(folder / REFERENCE_FILE, **arrays)  # type: ignore[arg-type]
        artifact = writer.adopt(folder, "reference", "reference")
    return Reference(artifact=artifact, cases=cases, trajectories=trajectories)


def _plan_set(name: str, target: Target, built: list[tuple[BuiltPlan, Artifact]], reference: Reference) -> PlanSet:
    first, _ = built[0]
    return PlanSet(
        target=name,
        backend=target.backend,
        device=target.device,
        precision=target.precision,
        options={"threads": target.threads},
        versions=first.versions | {library: version(library) for library in ("torch", "onnx", "onnxscript")},
        built_on=first.built_on,
        plan_file=first.file,
        profiles=tuple(
            ProfileFacts(
                name=profile.name,
                latents=profile.latents.corners(),
                rows=profile.rows.corners(),
                plan=artifact,
                parity=NOT_RUN,
            )
            for plan, artifact in built
            for profile in plan.profiles
        ),
        reference=reference,
    )


def _manifest(writer: BundleWriter, facts: ModelFacts, graph: Artifact, plan_set: PlanSet) -> Manifest:
    """The new plan set beside those of other targets that an earlier build made of the same model."""
    earlier = writer.existing()
    kept = earlier.plan_sets if earlier and earlier.model == facts else ()
    others = [old for old in kept if _key(old) != _key(plan_set)]
    return Manifest(
        schema_version=SCHEMA,
        package_version=version("elit-export"),
        model=facts,
        graphs={"step-fp32": graph},
        plan_sets=(*others, plan_set),
    )


def _key(plan_set: PlanSet) -> tuple[str, str]:
    return plan_set.target, plan_set.precision.value


def _verified(bundle: Bundle, plan_set: PlanSet, progress: Progress) -> PlanSet:
    """The plan set with what its engines showed; raises ParityError at the first miss."""
    progress("verify", 0.8)
    found: list[Comparison] = []
    with open_bank(bundle, plan_set) as bank:
        for comparison in compared(bundle, plan_set, bank, load_reference(bundle, plan_set.reference)):
            found.append(require(comparison))
            progress(f"verified {comparison.part}", 0.8 + 0.2 * len(found) / comparisons_of(plan_set))
    profiles = tuple(facts.model_copy(update={"parity": parity_of(facts.name, found)}) for facts in plan_set.profiles)
    return plan_set.model_copy(update={"profiles": profiles})
