"""Checkpoint → bundle: the one place that joins graphs, build, verify and bundle.

Takes: a recipe and a target.  Gives: a Bundle whose every profile was compared with PyTorch, or says why not.
May touch: the output folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from elit_export.backends import BACKENDS
from elit_export.bundle import Bundle, BundleWriter, writing
from elit_export.calibrate.quantize import check_tools, quantized_graph
from elit_export.checkpoint import checkpoint_sha256, stored_checkpoint
from elit_export.compile_decoder import DecoderStages
from elit_export.decoder import check_installed
from elit_export.decoder_folder import DecoderFolder, read_decoder
from elit_export.errors import BundleError, CalibrationError, RecipeError
from elit_export.graphs.export import export_graph
from elit_export.graphs.program import export_program
from elit_export.keys import GRAPH_LIBRARIES, QUANTIZING_LIBRARY, Keys, versions_of
from elit_export.manifest import (
    SCHEMA,
    Artifact,
    Graph,
    Manifest,
    ModelFacts,
    Parity,
    Plan,
    PlanSet,
    ProfileFacts,
    Reference,
)
from elit_export.models.elit import Elit
from elit_export.models.widening import computing_in_float32
from elit_export.recipe import AnyTarget, Recipe, load_recipe
from elit_export.runtime.opening import open_bank, unfit
from elit_export.samples import Samples, check_covered, command_for, load_samples
from elit_export.spec import (
    CACHE_GRAPHS,
    DECODE,
    EXACT_GRAPHS,
    FUSED,
    QUANTIZED,
    STEP,
    Precision,
    Profile,
    Range,
    covered_text,
    covering,
)
from elit_export.verify.cases import REFERENCE_FILE, cache_rows, reference_cases, reference_trajectories
from elit_export.verify.parity import (
    Comparison,
    compared,
    compared_cases,
    comparisons_of,
    decoder_parity_of,
    load_reference,
    load_reference_file,
    met_db,
    parity_of,
    require,
)
from elit_export.verify.reference import reference_arrays

NOTHING_CHANGED = "nothing changed"
ANY_BUDGET = Range(1, 1, 1)  # of graphs without latents
BEING_BUILT = Parity(status="not run", reason="being built")
Progress = Callable[[str, float], None]
Profiles = tuple[Profile, ...]
# Share of a build that is done when a stage begins.
STARTS = {"checkpoint": 0.0, "reference": 0.1, "graph": 0.2, "quantize": 0.4, "plans": 0.5, "verify": 0.8}


def no_progress(_stage: str, _share: float) -> None:
    """Say nothing."""


def compile_bundle(
    recipe: str | Path | Recipe,
    target: str,
    *,
    out: str | Path,
    checkpoint: str | Path | None = None,
    interface: str | Path | None = None,
    samples: str | Path | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Export, build, verify, and only then make the bundle in `out` real.

    `checkpoint` and `interface` take the places of the recipe's. `samples` is the file of `calibrate samples`, which a
    target in int8 or fp8 needs. What an earlier build made from the same checkpoint, recipe, decoder, samples,
    libraries, CPU (where plans depend on it) and code stays as it is, and so do plan sets of other targets of the same
    model. Plans whose device is not here are recorded as never run. `progress` hears each stage that does something
    and the share done before it, and NOTHING_CHANGED at the end if the manifest stays as it was. Raises the package's
    errors; a failed or interrupted build leaves an earlier bundle as it was.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    chosen = recipe.target(target)
    source, added = checkpoint or recipe.checkpoint, interface or recipe.interface
    if source is None:
        raise RecipeError(f"recipe {recipe.name} names no checkpoint: give one (--checkpoint FILE)")
    BACKENDS[chosen.backend].builder().check(chosen)  # before anything that takes long
    if chosen.precision in QUANTIZED and not BACKENDS[chosen.backend].rounds:
        check_tools()
    _check_samples(chosen, target, samples, command_for("samples.npz", out, text=recipe.text is not None))
    folder = _decoder_folder(recipe)
    file = Path(samples) if samples else None
    with writing(Path(out)) as writer:
        return _Build(writer, recipe, target, chosen, str(source), added, file, folder, progress).run()


def _decoder_folder(recipe: Recipe) -> DecoderFolder | None:
    if recipe.decoder is None:
        return None
    check_installed()
    return read_decoder(recipe.decoder.folder)


def _check_samples(chosen: AnyTarget, target: str, samples: str | Path | None, remedy: str) -> None:
    if chosen.precision in QUANTIZED and samples is None:
        raise CalibrationError(
            f"target {target} is {chosen.precision.value}, which is calibrated on real inputs: "
            f"{remedy} (from a bundle with any other target), "
            f"then build with --samples samples.npz"
        )
    if chosen.precision not in QUANTIZED and samples is not None:
        raise CalibrationError(f"target {target} is {chosen.precision.value} and takes no samples: leave them out")


@dataclass
class _Build:
    """One build in progress. Every stage has a key, a hash of all it depends on; an equal key means fresh."""

    writer: BundleWriter
    recipe: Recipe
    target: str
    chosen: AnyTarget
    source: str
    interface: str | Path | None
    samples_file: Path | None
    decoder_folder: DecoderFolder | None
    progress: Progress

    def run(self) -> Bundle:
        facts = self._facts()
        profiles = self.recipe.profiles_for(facts.spec)
        if self.samples:  # before anything is made
            check_covered(self.samples, profiles)
        decoding = self._decoding()
        reference = self._reference(profiles)
        graphs = {**self._graphs(reference), **decoding}
        unverified = self._plan_set(graphs, profiles, reference)
        plan_set = self._verified(facts, graphs, unverified)
        manifest = self._manifest(facts, graphs, plan_set)
        if manifest == self.earlier:
            self.progress(NOTHING_CHANGED, 1.0)
            return Bundle(self.writer.folder, manifest)
        return self.writer.commit(manifest)

    # ------------------------------------------------------------ what there is

    @cached_property
    def earlier(self) -> Manifest | None:
        return self.writer.existing()

    @cached_property
    def earlier_plan_sets(self) -> tuple[PlanSet, ...]:
        return self.earlier.plan_sets if self.earlier else ()

    @cached_property
    def before(self) -> PlanSet | None:
        """The plan set that this build replaces."""
        return next((old for old in self.earlier_plan_sets if self._is_same_target(old)), None)

    def _is_same_target(self, plan_set: PlanSet) -> bool:
        return (plan_set.target, plan_set.precision) == (self.target, self.chosen.precision)

    def _is_whole(self, artifact: Artifact) -> bool:
        assert self.earlier
        try:
            Bundle(self.writer.folder, self.earlier).verified(artifact)
        except BundleError:
            return False
        return True

    @cached_property
    def samples(self) -> Samples | None:
        """What a quantized target is calibrated on; raises CalibrationError if it is not of this checkpoint."""
        return load_samples(self.samples_file, self._facts().spec, self.sha256) if self.samples_file else None

    @cached_property
    def keys(self) -> Keys:
        return Keys(self.recipe, self.chosen, self.sha256, self.samples)

    @cached_property
    def model_key(self) -> str:
        return Keys(self.recipe, self.chosen, self.sha256, None).model

    @cached_property
    def model(self) -> Elit:
        self.progress("read checkpoint", STARTS["checkpoint"])
        return stored_checkpoint(self.source, interface=self.interface, **self.recipe.architecture.model_dump())

    @cached_property
    def sha256(self) -> str:
        return checkpoint_sha256(self.source, self.interface)

    @cached_property
    def decoder(self) -> DecoderStages | None:
        """Raises RecipeError if the recipe's decoder does not fit the model."""
        table, folder = self.recipe.decoder, self.decoder_folder
        if table is None or folder is None:
            return None
        model = self._facts()
        folder.check_fits(model.spec, model.data)
        return DecoderStages(
            folder=folder,
            spec=folder.spec(min(model.spec.input_size, table.tile)),
            rows=table.rows.value(),
            keys=self.keys,
            writer=self.writer,
            earlier=tuple(old.decoder for old in self.earlier_plan_sets if old.decoder),
            fresh=self._fresh,
            is_whole=self._is_whole,
            say=lambda stage: self.progress(stage, STARTS["checkpoint"]),
        )

    # ------------------------------------------------------------ stages

    def _decoding(self) -> dict[str, Graph]:
        """The decoder's graph and answers, before what takes long, so that a damaged folder is found out early."""
        if self.decoder is None:
            return {}
        graphs = {self.keys.stored_name(DECODE): self.decoder.graph}
        _ = self.decoder.answers
        return graphs

    def _facts(self) -> ModelFacts:
        if self.earlier and self.earlier.model_key == self.model_key:
            return self.earlier.model
        return ModelFacts(
            name=self.recipe.name, spec=self.model.spec, data=self.model.data, checkpoint_sha256=self.sha256
        )

    def _graphs(self, reference: Reference) -> dict[str, Graph]:
        """Every graph of the target, by the name that the bundle stores it under."""
        names = (STEP, *CACHE_GRAPHS, *((FUSED,) if self.chosen.fused else ()))
        written = {name: self.keys.precision_of(name) for name in names}
        exact = {name: Precision.FP32 if precision in QUANTIZED else precision for name, precision in written.items()}
        graphs = {
            self.keys.stored_name(name, precision): self._exported(name, precision) for name, precision in exact.items()
        }
        if written[STEP] in QUANTIZED:
            graphs[self.keys.stored_name(STEP)] = self._quantized(
                graphs[self.keys.stored_name(STEP, Precision.FP32)], reference
            )
        return graphs

    def _fresh(self, name: str, key: str) -> Graph | None:
        old = self.earlier.graphs.get(name) if self.earlier else None
        return old if old and old.key == key and self._is_whole(old.artifact) else None

    def _exported(self, graph: str, precision: Precision) -> Graph:
        name = self.keys.stored_name(graph, precision)
        key = self.keys.graph(name)
        if old := self._fresh(name, key):
            return old
        model = self.model
        self.progress(f"export graph {graph}", STARTS["graph"])
        export = {"onnx": export_graph, "program": export_program}[BACKENDS[self.chosen.backend].reads]
        with self.writer.staged() as folder:
            file = export(model, graph, folder, precision).name
            artifact = self.writer.adopt(folder, "graphs", name)
        return Graph(artifact=artifact, file=file, key=key, versions=versions_of(GRAPH_LIBRARIES))

    def _quantized(self, exact: Graph, reference: Reference) -> Graph:
        """`step` in int8 or fp8; raises ParityError if ONNX Runtime, running it, is too far from PyTorch."""
        name, key = self.keys.stored_name(STEP), self.keys.quantized(exact, reference)
        old = self._fresh(name, key)
        if old and (self.chosen.accept_below_tolerance or met_db(old.sqnr_db, self.chosen.precision)):
            return old
        assert self.samples
        self.progress(f"quantize graph {STEP}", STARTS["quantize"])
        with self.writer.staged() as folder:
            path = quantized_graph(self._path(exact), folder, self.chosen.precision, self.samples)
            sqnr_db = self._graph_sqnr_db(path, reference)
            artifact = self.writer.adopt(folder, "graphs", name)
        versions = versions_of((*GRAPH_LIBRARIES, QUANTIZING_LIBRARY))
        return Graph(artifact=artifact, file=path.name, key=key, versions=versions, sqnr_db=sqnr_db)

    def _graph_sqnr_db(self, graph: Path, reference: Reference) -> float:
        """The worst over the reference cases."""
        arrays = load_reference_file(self.writer.folder / reference.artifact.kind / reference.artifact.name)
        engines = BACKENDS["onnxruntime"].engines()
        with engines.OnnxRuntimeEngine(graph, device="cpu", threads=0, as_written=True) as engine:
            found = [
                self._required(comparison)
                for comparison in compared_cases(engine, self.chosen.precision, reference, arrays, self._facts().spec)
            ]
        return min(comparison.found.sqnr_db for comparison in found)

    def _required(self, comparison: Comparison) -> Comparison:
        """Of a quantized graph; raises ParityError with what to do about a miss."""
        accepted = replace(comparison, accepted=self.chosen.accept_below_tolerance or "")
        remedy = (
            f"elit-export calibrate sensitivity {self.writer.folder} --samples {self.samples_file} "
            f"--precision {self.chosen.precision.value} shows which layers cost it"
        )
        return require(accepted, remedy)

    def _path(self, graph: Graph) -> Path:
        return self.writer.folder / graph.artifact.kind / graph.artifact.name / graph.file

    def _reference(self, profiles: Profiles) -> Reference:
        """PyTorch's answers, which targets with the same profiles share."""
        key = self.keys.reference(profiles)
        for old in self.earlier_plan_sets:
            if old.reference.key == key and self._is_whole(old.reference.artifact):
                return old.reference
        model = self.model
        self.progress("PyTorch reference", STARTS["reference"])
        cases = reference_cases(profiles)
        trajectories = reference_trajectories(profiles, model.spec)
        rows = cache_rows(profiles)
        arrays = reference_arrays(computing_in_float32(model), cases, rows, trajectories, covered_text(profiles))
        with self.writer.staged() as folder:
            np.savez(folder / REFERENCE_FILE, **arrays)  # type: ignore[arg-type]
            artifact = self.writer.adopt(folder, "reference", "reference")
        return Reference(artifact=artifact, key=key, cache_rows=rows, cases=cases, trajectories=trajectories)

    def _plan_set(self, graphs: Mapping[str, Graph], profiles: Profiles, reference: Reference) -> PlanSet:
        """Every plan that is not fresh built, every profile not yet verified unless nothing in it changed."""
        groups = BACKENDS[self.chosen.backend].builder().grouped(profiles, self.chosen)
        others = [*CACHE_GRAPHS, *([FUSED] if self.chosen.fused else []), *([DECODE] if self.decoder else [])]
        share = 1 / (len(groups) + len(others))
        with self.writer.staged() as shared:
            plans = [
                self._plan(STEP, graphs[self.keys.stored_name(STEP)], group, shared, (index * share, share))
                for index, group in enumerate(groups)
            ]
            more = {
                name: self._plan(
                    name,
                    graphs[self.keys.stored_name(name)],
                    self._whole(name, profiles),
                    shared,
                    (index * share, share),
                )
                for index, name in enumerate(others, start=len(groups))
            }
        plan_set = PlanSet(
            target=self.target,
            backend=self.chosen.backend,
            device=self.chosen.device,
            precision=self.chosen.precision,
            options=self.chosen.options(),
            graph=self.keys.stored_name(STEP),
            profiles=tuple(
                ProfileFacts(
                    name=profile.name,
                    latents=profile.latents.corners(),
                    rows=profile.rows.corners(),
                    text=profile.text.corners() if profile.text else None,
                    plan=plan,
                    parity=BEING_BUILT,
                )
                for group, plan in zip(groups, plans, strict=True)
                for profile in group
            ),
            cache={name: more[name] for name in CACHE_GRAPHS},
            fused=more.get(FUSED),
            decoder=self.decoder.facts(more[DECODE], BEING_BUILT) if self.decoder else None,
            reference=reference,
            samples=self.samples.facts if self.samples else None,
            accepted=self.chosen.accept_below_tolerance,
        )
        if self.before and self.before.with_parity(lambda _profile: BEING_BUILT, BEING_BUILT) == plan_set:
            return self.before
        return plan_set

    def _whole(self, graph: str, profiles: Profiles) -> Profiles:
        """One profile over all of them, for a graph that serves every budget; only `fused` takes text too."""
        if graph == DECODE:
            assert self.decoder
            return (Profile(graph, ANY_BUDGET, self.decoder.rows),)
        rows = covering([profile.rows for profile in profiles])
        if graph in CACHE_GRAPHS:
            return (Profile(graph, ANY_BUDGET, rows),)
        latents, text = covering([profile.latents for profile in profiles]), covered_text(profiles)
        return (Profile(graph, latents, rows, text),)

    def _plan(self, name: str, graph: Graph, profiles: Profiles, shared: Path, part: tuple[float, float]) -> Plan:
        """One plan, built in a folder of its own inside the one that the plans of the set share.

        `part` is the share of all plans that is done before it, and its own.
        """
        key = self.keys.plan(name, graph, profiles)
        for old in self.before.plans if self.before else ():
            if old.key == key and self._is_whole(old.artifact):
                return old
        what = ", ".join([name, *(profile.name for profile in profiles if name == STEP)])

        before, share = part

        def on_share(done: float) -> None:
            whole = STARTS["verify"] - STARTS["plans"]
            self.progress(f"build {what}", STARTS["plans"] + whole * (before + done * share))

        on_share(0.0)
        builder = BACKENDS[self.chosen.backend].builder()
        folder = shared / f"{name}-{profiles[0].name}"
        folder.mkdir()
        quantizes = self.samples if name == STEP and BACKENDS[self.chosen.backend].rounds else None
        built = builder.build_plan(self._path(graph), folder, profiles, self.chosen, quantizes, on_share)
        precision = Precision.FP32 if name in EXACT_GRAPHS else self.chosen.precision
        prefix = f"{name}-{self.target}-{precision.value}-{built.label}"
        artifact = self.writer.adopt(folder, "plans", prefix)
        return Plan(artifact=artifact, key=key, file=built.file, versions=built.versions, built_on=built.built_on)

    def _verified(self, facts: ModelFacts, graphs: Mapping[str, Graph], plan_set: PlanSet) -> PlanSet:
        """The plan set with what its engines showed, or why they did not run; raises ParityError at the first miss."""
        if plan_set is self.before and all(parity.ran for parity in plan_set.parities):
            return plan_set
        if reason := unfit(plan_set):
            not_run = Parity(status="not run", reason=reason)
            return plan_set.with_parity(lambda _profile: not_run, not_run)
        self.progress("verify", STARTS["verify"])
        bundle = Bundle(self.writer.folder, self._manifest(facts, graphs, plan_set))
        found: list[Comparison] = []
        with open_bank(bundle, plan_set) as bank:
            for comparison in compared(bundle, plan_set, bank, load_reference(bundle, plan_set.reference)):
                found.append(require(comparison))
                done = len(found) / comparisons_of(plan_set)
                self.progress(f"verified {comparison.part}", STARTS["verify"] + (1 - STARTS["verify"]) * done)
        return plan_set.with_parity(lambda profile: parity_of(profile, found), decoder_parity_of(found))

    def _manifest(self, facts: ModelFacts, graphs: Mapping[str, Graph], plan_set: PlanSet) -> Manifest:
        """The plan set in its place beside those of other targets that were built of the same model."""
        kept = self.earlier if self.earlier and self.earlier.model == facts else None
        plan_sets = [plan_set if self._is_same_target(old) else old for old in (kept.plan_sets if kept else ())]
        return Manifest(
            schema_version=SCHEMA,
            package_version=version("elit-export"),
            model=facts,
            model_key=self.model_key,
            graphs={**_still_used(kept.graphs if kept else {}, plan_sets), **graphs},
            plan_sets=tuple(plan_sets) if plan_set in plan_sets else (*plan_sets, plan_set),
            cache_calibration=kept.cache_calibration if kept else None,
        )


# ---------------------------------------------------------------- facts


def _still_used(graphs: Mapping[str, Graph], plan_sets: Sequence[PlanSet]) -> dict[str, Graph]:
    """Without graphs that no plan is made of any more: quantized ones, each of its own samples, and the decoder's."""
    named = {plan_set.graph for plan_set in plan_sets}
    if not any(plan_set.decoder for plan_set in plan_sets):
        graphs = {name: graph for name, graph in graphs.items() if name.split("-")[0] != DECODE}
    return {name: graph for name, graph in graphs.items() if graph.sqnr_db is None or name in named}
