"""Recipe + target → bundle: checks first, then the stages in order.

Each stage goes through `Store.artifact`, which reuses what is still fresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from elit_export.backends.target import Target
from elit_export.bundle.calibration_inputs import CalibrationInputs, check_covered, load_inputs
from elit_export.bundle.keys import Keys, model_key
from elit_export.bundle.manifest import SCHEMA, Graph, Manifest, ModelFacts, PlanSet
from elit_export.bundle.reading import Bundle
from elit_export.bundle.recipe import Recipe, load_recipe
from elit_export.bundle.shipped import shipped_solvers
from elit_export.bundle.store import Progress, Store, writing
from elit_export.callbacks import noop
from elit_export.checkpoints.vae import DecoderFolder, read_decoder
from elit_export.checkpoints.vae_decoder import check_installed
from elit_export.compiler.asked import check_asked
from elit_export.compiler.decoder import make_decoder
from elit_export.compiler.job import Job, Source
from elit_export.compiler.stages import make_graphs, make_plan_set, make_reference, verified
from elit_export.errors import RecipeError
from elit_export.graphs.quantize import check_tools
from elit_export.spec import DECODE

NOTHING_CHANGED = "nothing changed"


def compile_bundle(
    recipe: str | Path | Recipe,
    target: str,
    *,
    out: str | Path,
    checkpoint: str | Path | None = None,
    interface: str | Path | None = None,
    samples: str | Path | None = None,
    trust: bool = False,
    progress: Progress = noop,
) -> Bundle:
    """Export, build, verify, and only then write the manifest of the bundle in `out`.

    `checkpoint` and `interface` override those of the recipe. `samples` is the file of `calibrate samples`, which a
    target in int8 or fp8 needs. `trust` allows saved programs that somebody else built into `out`. Artifacts of an
    earlier build are reused if checkpoint, recipe, decoder, samples, libraries, code and (where plans depend on it) CPU
    are the same; plan sets of other targets of the same model stay. Plans whose device is not on this machine are
    recorded as not run. `progress` is called with each stage that does something and the share done before it, and with
    NOTHING_CHANGED at the end if the manifest stays the same. Raises the package's errors; a failed or interrupted
    build leaves an earlier bundle unchanged.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    options, path = recipe.target(target), checkpoint or recipe.checkpoint
    if path is None:
        raise RecipeError(f"recipe {recipe.name} names no checkpoint", "give one (--checkpoint FILE)")
    file = Path(samples) if samples else None
    request = BuildRequest(recipe, target, options, str(path), interface or recipe.interface, file, trust=trust)
    decoder = request.check(Path(out))  # before anything that takes long
    with writing(Path(out), progress) as store:
        return _build(store, request, decoder)


@dataclass(frozen=True)
class BuildRequest:
    """The arguments of one build, with the recipe read and its target selected."""

    recipe: Recipe
    target: str
    options: Target
    checkpoint: str
    interface: str | Path | None
    inputs_file: Path | None
    trust: bool

    def check(self, out: Path) -> DecoderFolder | None:
        """Check all that needs no checkpoint; returns the configuration of the recipe's decoder."""
        options = self.options
        check_asked(self.recipe, self.target, self.inputs_file, out)
        if options.precision.quantized and not options.facts.casts_weights:
            check_tools()
        if self.recipe.decoder is None:
            return None
        check_installed()
        return read_decoder(self.recipe.decoder.folder)


def _build(store: Store, request: BuildRequest, folder: DecoderFolder | None) -> Bundle:
    earlier = store.manifest
    source = Source(request.checkpoint, request.interface, request.recipe.architecture.model_dump(), store.progress)
    key = model_key(request.recipe, source.sha256)
    facts = earlier.model if earlier and earlier.model_key == key else _facts_of(source, request.recipe)
    profiles = request.recipe.profiles_for(facts.spec)
    inputs = _inputs_of(request, facts)
    if inputs:  # before anything is built
        check_covered(inputs, profiles)
    keys = Keys(request.options, key, inputs.sha256 if inputs else "")
    job = Job(
        store,
        request.target,
        request.options,
        source,
        keys,
        facts,
        profiles,
        inputs,
        request.inputs_file,
        request.trust,
    )
    decoder = make_decoder(job, folder, request.recipe.decoder) if folder and request.recipe.decoder else None
    reference = make_reference(job)
    graphs = make_graphs(job, reference)
    if decoder:
        graphs[keys.stored_name(decoder.spec.graph)] = decoder.graph
    plan_set = make_plan_set(job, graphs, reference, decoder)
    before = _same_target(earlier, plan_set)
    if before and before.without_parity() == plan_set.without_parity():
        plan_set = before
    draft = _manifest(earlier, facts, key, graphs, plan_set)
    drafted = Bundle(store.folder, draft, trust=request.trust)
    manifest = _manifest(earlier, facts, key, graphs, verified(job, drafted, plan_set))
    if manifest == earlier:
        store.progress(NOTHING_CHANGED, 1.0)
        return Bundle(store.folder, manifest)
    return store.commit(manifest)


def _facts_of(source: Source, recipe: Recipe) -> ModelFacts:
    model = source.model()
    return ModelFacts(name=recipe.name, spec=model.spec, data=model.data, checkpoint_sha256=source.sha256)


def _inputs_of(request: BuildRequest, facts: ModelFacts) -> CalibrationInputs | None:
    """Load the calibration inputs of a quantized target; raises CalibrationError if they are of another checkpoint."""
    file = request.inputs_file
    return load_inputs(file, facts.spec, facts.checkpoint_sha256) if file else None


def _same_target(manifest: Manifest | None, plan_set: PlanSet) -> PlanSet | None:
    """Return the plan set of an earlier build that the new one replaces."""
    plan_sets = manifest.plan_sets if manifest else ()
    return next((old for old in plan_sets if old.name == plan_set.name), None)


def _manifest(
    earlier: Manifest | None, facts: ModelFacts, key: str, graphs: dict[str, Graph], plan_set: PlanSet
) -> Manifest:
    """Return the manifest with the plan set beside those of other targets that were built from the same model.

    What was measured of that model and recorded beside them stays too; of another one, nothing does. A new bundle of
    the shipped model gets the solver tables that come with it.
    """
    kept = earlier if earlier and earlier.model == facts else None
    plan_sets = [plan_set if old.name == plan_set.name else old for old in (kept.plan_sets if kept else ())]
    if plan_set not in plan_sets:
        plan_sets.append(plan_set)
    made: dict[str, Any] = {
        "schema_version": SCHEMA,
        "package_version": version("elit-export"),
        "model": facts,
        "model_key": key,
        "graphs": {**_still_used(kept.graphs if kept else {}, plan_sets), **graphs},
        "plan_sets": tuple(plan_sets),
    }
    if kept:
        return kept.model_copy(update=made)
    return Manifest(**made, solvers=shipped_solvers(facts.checkpoint_sha256))


def _still_used(graphs: dict[str, Graph], plan_sets: list[PlanSet]) -> dict[str, Graph]:
    """Leave out graphs that no plan is built from any more: quantized ones of other inputs, and an unused decoder's."""
    used = {plan_set.graph for plan_set in plan_sets}
    has_decoder = any(plan_set.decoder for plan_set in plan_sets)
    return {
        name: graph
        for name, graph in graphs.items()
        if (has_decoder or graph.graph != DECODE) and (not graph.precision.quantized or name in used)
    }
