"""Checkpoint → bundle: the one place that joins graphs, build, verify and bundle.

Takes: a recipe and a target.  Gives: a Bundle whose every profile was compared with PyTorch.
May touch: the output folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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
from elit_export.errors import BundleError, RecipeError
from elit_export.files import sha256_of
from elit_export.graphs.export import export_step
from elit_export.models.sit import ElitSiT
from elit_export.recipe import Recipe, Target, load_recipe
from elit_export.runtime.pipeline import open_bank
from elit_export.spec import Profile
from elit_export.verify.cases import REFERENCE_FILE, reference_cases, reference_trajectories
from elit_export.verify.parity import Comparison, compared, comparisons_of, load_reference, parity_of, require
from elit_export.verify.reference import reference_arrays

GRAPH = "step-fp32"
NOTHING_CHANGED = "nothing changed"
NOT_RUN = Parity(status="not run", reason="being built")
Progress = Callable[[str, float], None]
Profiles = tuple[Profile, ...]


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

    `checkpoint` takes the place of the recipe's. What an earlier build made from the same checkpoint,
    recipe, libraries and code stays as it is, and so do plan sets of other targets of the same model.
    `progress` hears each stage that does something and the share done before it, and NOTHING_CHANGED
    at the end if the manifest stays as it was. Raises the package's errors; a failed or interrupted build leaves
    an earlier bundle as it was.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    chosen = recipe.target(target)
    source = checkpoint or recipe.checkpoint
    if source is None:
        raise RecipeError(f"recipe {recipe.name} names no checkpoint: give one (--checkpoint FILE)")
    with writing(Path(out)) as writer:
        return _Build(writer, recipe, target, chosen, str(source), progress).run()


@dataclass
class _Build:
    """One build in progress. Every stage has a key, a hash of all it depends on; an equal key means fresh."""

    writer: BundleWriter
    recipe: Recipe
    target: str
    chosen: Target
    source: str
    progress: Progress

    def run(self) -> Bundle:
        facts = self._facts()
        profiles = self.recipe.profiles_for(facts.spec)
        graph = self._graph()
        unverified = self._plan_set(graph, profiles)
        plan_set = self._verified(facts, graph, unverified)
        manifest = self._manifest(facts, graph, plan_set)
        if manifest == self.earlier:
            self.progress(NOTHING_CHANGED, 1.0)
            return Bundle(self.writer.folder, manifest)
        return self.writer.commit(manifest)

    # ------------------------------------------------------------ what there is

    @cached_property
    def earlier(self) -> Manifest | None:
        return self.writer.existing()

    @cached_property
    def before(self) -> PlanSet | None:
        """The plan set that this build replaces."""
        plan_sets = self.earlier.plan_sets if self.earlier else ()
        return next((old for old in plan_sets if self._is_same_target(old)), None)

    def _is_same_target(self, plan_set: PlanSet) -> bool:
        return (plan_set.target, plan_set.precision) == (self.target, self.chosen.precision)

    def _is_fresh(self, stage: str, key: str, *artifacts: Artifact) -> bool:
        """Was this stage of `before` made from the same, and is it still whole on disk?"""
        if self.before is None or self.earlier is None or self.before.keys.get(stage) != key:
            return False
        try:
            for artifact in artifacts:
                Bundle(self.writer.folder, self.earlier).verified(artifact)
        except BundleError:
            return False
        return True

    @cached_property
    def model(self) -> ElitSiT:
        self.progress("read checkpoint", 0.0)
        return load_checkpoint(self.source, **self.recipe.architecture.model_dump())

    @cached_property
    def sha256(self) -> str:
        return sha256_of(checkpoint_path(self.source))

    # ------------------------------------------------------------ keys

    @cached_property
    def model_key(self) -> str:
        architecture = self.recipe.architecture.model_dump()
        return key_of(self.sha256, architecture, self.recipe.name, code("checkpoint.py", "spec.py", "models"))

    @cached_property
    def graph_key(self) -> str:
        libraries = [version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")]
        return key_of(self.model_key, code("graphs"), libraries)

    def plan_key(self, graph: Artifact, profiles: Profiles) -> str:
        library = BACKENDS[self.chosen.backend].engines().library_version()
        choices = self.chosen.model_dump(mode="json")
        return key_of(graph.name, str(profiles), choices, library, code("build", "backends.py"))

    def reference_key(self, profiles: Profiles) -> str:
        return key_of(self.model_key, str(profiles), version("torch"), code("verify", "runtime"))

    # ------------------------------------------------------------ stages

    def _facts(self) -> ModelFacts:
        if self.earlier and self._is_fresh("model", self.model_key):
            return self.earlier.model
        return ModelFacts(
            name=self.recipe.name, spec=self.model.spec, data=self.model.data, checkpoint_sha256=self.sha256
        )

    def _graph(self) -> Artifact:
        old = self.earlier.graphs.get(GRAPH) if self.earlier else None
        if old and self._is_fresh("graph", self.graph_key, old):
            return old
        model = self.model
        self.progress("export graph", 0.1)
        return _exported(self.writer, model)

    def _plan_set(self, graph: Artifact, profiles: Profiles) -> PlanSet:
        """Not yet verified, unless nothing in it changed."""
        keys = {
            "model": self.model_key,
            "graph": self.graph_key,
            "plan": self.plan_key(graph, profiles),
            "reference": self.reference_key(profiles),
        }
        built = None
        if not (self.before and self._is_fresh("plan", keys["plan"], *self.before.plans)):
            self.progress("build plan", 0.5)
            graph_file = self.writer.folder / graph.kind / graph.name / "step.onnx"
            built = _built(self.writer, graph_file, profiles, self.chosen, self.target)
        reference = self._reference(profiles, keys["reference"])
        if built:
            return _plan_set(self.target, self.chosen, built, reference, keys)
        assert self.before
        return self.before.model_copy(update={"reference": reference, "keys": keys})

    def _reference(self, profiles: Profiles, key: str) -> Reference:
        if self.before and self._is_fresh("reference", key, self.before.reference.artifact):
            return self.before.reference
        model = self.model
        self.progress("PyTorch reference", 0.6)
        return _referenced(self.writer, model, profiles)

    def _verified(self, facts: ModelFacts, graph: Artifact, plan_set: PlanSet) -> PlanSet:
        """The plan set with what its engines showed; raises ParityError at the first miss."""
        if plan_set == self.before and all(profile.parity.status == "passed" for profile in plan_set.profiles):
            return plan_set
        self.progress("verify", 0.8)
        bundle = Bundle(self.writer.folder, self._manifest(facts, graph, plan_set))
        found: list[Comparison] = []
        with open_bank(bundle, plan_set) as bank:
            for comparison in compared(bundle, plan_set, bank, load_reference(bundle, plan_set.reference)):
                found.append(require(comparison))
                self.progress(f"verified {comparison.part}", 0.8 + 0.2 * len(found) / comparisons_of(plan_set))
        profiles = tuple(
            facts.model_copy(update={"parity": parity_of(facts.name, found)}) for facts in plan_set.profiles
        )
        return plan_set.model_copy(update={"profiles": profiles})

    def _manifest(self, facts: ModelFacts, graph: Artifact, plan_set: PlanSet) -> Manifest:
        """The plan set in its place beside those of other targets that were built of the same model."""
        kept = self.earlier.plan_sets if self.earlier and self.earlier.model == facts else ()
        others = [plan_set if self._is_same_target(old) else old for old in kept]
        return Manifest(
            schema_version=SCHEMA,
            package_version=version("elit-export"),
            model=facts,
            graphs={GRAPH: graph},
            plan_sets=tuple(others) if plan_set in others else (*others, plan_set),
        )


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def code(*places: str) -> str:
    """A hash of the package's own source in these files and folders."""
    package = Path(__file__).parent
    files = [path for place in places for path in sorted((package / place).rglob("*.py")) or [package / place]]
    return key_of(*(path.read_text(encoding="utf-8") for path in files))


# ---------------------------------------------------------------- what the stages make


def _exported(writer: BundleWriter, model: ElitSiT) -> Artifact:
    with writer.staged() as folder:
        export_step(model, folder)
        return writer.adopt(folder, "graphs", GRAPH)


def _built(
    writer: BundleWriter, graph: Path, profiles: Profiles, target: Target, name: str
) -> list[tuple[BuiltPlan, Artifact]]:
    build_plans = BACKENDS[target.backend].builder().build_plans
    with writer.staged() as folder:
        prefix = f"step-{target.backend}-{name}-{target.precision.value}"
        return [
            (plan, writer.adopt(plan.folder, "plans", prefix)) for plan in build_plans(graph, folder, profiles, target)
        ]


def _referenced(writer: BundleWriter, model: ElitSiT, profiles: Profiles) -> Reference:
    cases = reference_cases(profiles)
    trajectories = reference_trajectories(profiles, model.spec)
    arrays = reference_arrays(model, cases, trajectories)
    with writer.staged() as folder:
        np.savez(folder / REFERENCE_FILE, **arrays)  # type: ignore[arg-type]
        artifact = writer.adopt(folder, "reference", "reference")
    return Reference(artifact=artifact, cases=cases, trajectories=trajectories)


def _plan_set(
    name: str, target: Target, built: list[tuple[BuiltPlan, Artifact]], reference: Reference, keys: dict[str, str]
) -> PlanSet:
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
        keys=keys,
    )
