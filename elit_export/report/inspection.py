"""Describes a checkpoint, a bundle or a named model as plain facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elit_export.backends.tensorrt.trtexec import trtexec_line
from elit_export.bundle.manifest import DecoderFacts, Manifest, PlanSet, budgets_of
from elit_export.bundle.presets import Preset
from elit_export.bundle.reading import Bundle
from elit_export.cost.flops import USUAL_TEXT, flops, flops_without_interface, guided_shares
from elit_export.cost.params import (
    ASSUMED_SHARE,
    GPUS_GB,
    PEAK_FLOPS,
    ROWS,
    activation_bytes,
    expected_ms,
    fitting,
    parameters,
)
from elit_export.errors import InputError
from elit_export.models.registry import NAMES, named_spec
from elit_export.report.files import TRAINING, file_facts
from elit_export.runtime.opening import matching, select_plan_set
from elit_export.runtime.presets import usability_problem
from elit_export.spec import STEP, DataFacts, ModelSpec, Precision, Range, covered_text, default_profiles, listed
from elit_export.verify.parity import accepted_miss

Facts = dict[str, Any]
ONNX_SUFFIX = ".onnx"
WEAK = "eighth"  # budget of the weak branch
NAMED_DATA = DataFacts(kind="vae", vae="of the checkpoint")


def inspect_path(
    path: str,
    *,
    interface: str | Path | None = None,
    resolution: int = 256,
    text: int | None = None,
    target: str | None = None,
    precision: str | None = None,
    **numbers: int | None,
) -> Facts:
    """Describe a bundle, a checkpoint, a file of `report.files` or, where there is none, the model with that name.

    `target` and `precision` choose from the plan sets of a bundle.
    A folder with a `config.json`, or for which there is an `interface`, is a checkpoint of diffusers. `resolution` is
    that of a named model. `text` is the number of prompt tokens, by default the number that a bundle is optimised for,
    else USUAL_TEXT. Raises BundleError, CheckpointError or InputError.
    """
    tokens = USUAL_TEXT if text is None else text
    if interface is None and _is_bundle(Path(path)):
        return bundle_facts(Bundle.open(path), text, target, precision)
    _refuse_for({"target": target, "precision": precision}, f"{path} is not a bundle")
    if facts := file_facts(Path(path)) if interface is None else None:
        weights = Path(path) / "model.safetensors"
        return {**facts, "model": checkpoint_facts(str(weights))} if weights.is_file() else facts
    if path in NAMES and not Path(path).exists():
        settled = {name: value for name, value in numbers.items() if name != "head_depth"}  # that has no one depth
        _refuse_for({"interface": interface, **settled}, f"{path} is the name of a size")
        return named_facts(path, named_spec(path, resolution=resolution, head_depth=numbers.get("head_depth")), tokens)
    return checkpoint_facts(path, interface, tokens, **numbers)


def _refuse_for(options: Mapping[str, object], reason: str) -> None:
    """Refuse options that what is inspected decides or does not use."""
    if used := [key for key, value in options.items() if value is not None]:
        raise InputError(f"{reason}, for which there is no --{used[0].replace('_', '-')}", "leave it out")


def _is_bundle(folder: Path) -> bool:
    """A folder that is neither of diffusers nor of a training is taken for one, as its errors say what is missing."""
    return folder.is_dir() and not _is_of_diffusers(folder) and not any((folder / name).is_file() for name in TRAINING)


def _is_of_diffusers(folder: Path) -> bool:
    """Whether this is a folder of diffusers, as in `checkpoints.diffusers.transformer_folder`, which needs torch."""
    return any((folder / part / "config.json").is_file() for part in ("", "transformer"))


def named_facts(name: str, spec: ModelSpec, text: int) -> Facts:
    """Describe a model without weights: shapes, costs, and the GPU memory it needs."""
    facts = model_facts(spec, NAMED_DATA, text)
    return {"kind": "named size", "name": name, "parameters": parameters(spec).total, **facts} | {
        "deployment": deployment_facts(spec, facts["text_tokens"])
    }


def deployment_facts(spec: ModelSpec, text: int) -> Facts:
    """Estimate weights, plans and GPUs by precision, and a step's time by budget; nothing is measured."""
    counts, named = parameters(spec), list(spec.named_budgets)
    weak = WEAK if WEAK in named else named[-1]
    plans = len(default_profiles(spec.latents, Range(1, 1, 1), step=spec.budget_step))
    return {
        "rows": ROWS,
        "assumed_flops": ASSUMED_SHARE * PEAK_FLOPS,
        "assumed_share": ASSUMED_SHARE,
        "peak_flops": PEAK_FLOPS,
        "rounded_parameters": counts.rounded,
        "exact_parameters": counts.exact,
        "per_profile_plans": plans,
        "gpus": dict(GPUS_GB),
        "precisions": {
            precision.value: {
                "weight_bytes": weights,
                "activation_bytes": activations,
                "per_profile_bytes": plans * weights,
                "fits_one_plan": fitting(weights + activations),
                "fits_per_profile": fitting(plans * weights + activations),
            }
            for precision in (Precision.FP32, Precision.BF16, Precision.FP8)
            for weights in (counts.size_bytes(precision),)
            for activations in (activation_bytes(spec, precision, ROWS, text),)
        },
        "weak": weak,
        "guided_share": guided_shares(spec, weak, text),
        "step_ms": {name: expected_ms(spec, budget.kept, text) for name, budget in spec.named_budgets.items()},
    }


def checkpoint_facts(path: str, interface: str | Path | None = None, text: int = USUAL_TEXT, **numbers: Any) -> Facts:
    from elit_export.checkpoints.native import checkpoint_files, stored_checkpoint  # needs torch

    files = checkpoint_files(path, interface)
    model = stored_checkpoint(path, interface=interface, **numbers)
    file_facts = {
        "kind": "checkpoint",
        "file": Path(path).name if Path(path).is_dir() else files[0].name,
        "size_bytes": sum(file.stat().st_size for file in files),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return file_facts | model_facts(model.spec, model.data, text)


def bundle_facts(
    bundle: Bundle, text: int | None = None, target: str | None = None, precision: str | None = None
) -> Facts:
    """Return the facts of the model, and of the plan sets that are asked for; raises InputError if there are none."""
    manifest, calibration = bundle.manifest, bundle.manifest.cache_calibration
    plan_sets = matching(manifest.plan_sets, target, precision) or [
        select_plan_set(manifest.plan_sets, target, precision)
    ]
    text_range = covered_text([facts.profile for plan_set in manifest.plan_sets for facts in plan_set.profiles])
    tokens = text_range.opt if text is None and text_range else text or 0
    return {
        "kind": "bundle",
        "name": manifest.model.name,
        "schema_version": manifest.schema_version,
        "package_version": manifest.package_version,
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "parameters": parameters(manifest.model.spec).total,
        **model_facts(manifest.model.spec, manifest.model.data, tokens),
        "graphs": {
            name: {"size_bytes": graph.artifact.size_bytes, "sqnr_db": graph.sqnr_db}
            for name, graph in manifest.graphs.items()
        },
        "plan_sets": [plan_set_facts(plan_set, manifest) for plan_set in plan_sets],
        "cache_calibration": calibration.model_dump(mode="json") if calibration else None,
        "solvers": solver_facts(manifest),
        "presets": [preset_facts(bundle, preset) for preset in manifest.presets],
        "trtexec": trtexec_lines(bundle, plan_sets),
    }


def preset_facts(bundle: Bundle, preset: Preset) -> Facts:
    """Describe a preset with the lines that use it, and the problem that refuses it; None if it can be used."""
    folder, spec = bundle.folder, bundle.manifest.model.spec
    return {
        **preset.model_dump(mode="json"),
        "command": preset.tune_line(folder),
        "problem": usability_problem(bundle, preset) or None,
        "command_line": preset.command_line(folder, spec),
        "python_line": preset.python_line(folder, spec),
    }


def solver_facts(manifest: Manifest) -> list[Facts]:
    """Describe each solver table and its errors, and why it is not used; None if it is of this checkpoint."""
    stored = manifest.model_dump(mode="json", include={"solvers"})["solvers"]
    problems = [manifest.model.other_checkpoint(solver.checkpoint_sha256) or None for solver in manifest.solvers]
    return [
        {"name": solver.name, **facts, "problem": problem}
        for solver, facts, problem in zip(manifest.solvers, stored, problems, strict=True)
    ]


def trtexec_lines(bundle: Bundle, plan_sets: Iterable[PlanSet]) -> list[str]:
    """Return a line for each profile of these plan sets, from `step` in ONNX; none if the bundle lacks graphs."""
    manifest, lines = bundle.manifest, dict[str, None]()
    spec = manifest.model.spec.graph(STEP)
    for plan_set in plan_sets:
        graph = manifest.graphs.get(plan_set.graph)
        path = bundle.folder / graph.artifact.kind / graph.artifact.name / graph.file if graph else None
        if path and path.suffix == ONNX_SUFFIX and path.is_file():
            lines |= dict.fromkeys(trtexec_line(path, spec, [facts.profile]) for facts in plan_set.profiles)
    return list(lines)


def model_facts(spec: ModelSpec, data: DataFacts, text: int) -> Facts:
    """Describe the model; `text` is the number of prompt tokens, ignored for a model without text."""
    tokens = text if spec.takes_text else 0
    shapes = {
        "tokens": spec.tokens,
        "groups": spec.groups,
        "latents_per_group": spec.latents,
        "split": f"{spec.head_depth}-{spec.core_depth}-{spec.tail_depth}",
    }
    return {
        "spec": spec.to_dict(),
        "shapes": shapes,
        "data": data.to_dict(),
        "text_tokens": tokens,
        "flops_without_interface": flops_without_interface(spec, text=tokens),
        "budgets": budget_facts(spec, tokens),
    }


def budget_facts(spec: ModelSpec, text: int) -> list[Facts]:
    """List the named budgets, largest first, with FLOPs of one image's forward pass."""
    full = flops(spec, spec.full, text=text).total
    return [
        {"name": name, "budget": str(budget), "flops": cost, "share_of_full": cost / full}
        for name, budget in spec.named_budgets.items()
        for cost in (flops(spec, budget, text=text).total,)
    ]


def plan_set_facts(plan_set: PlanSet, manifest: Manifest) -> Facts:
    spec, graphs = manifest.model.spec, manifest.graphs
    return {
        "target": plan_set.target,
        "backend": plan_set.backend,
        "device": plan_set.device,
        "precision": plan_set.precision.value,
        "options": plan_set.options,
        "covered": listed(budgets_of(plan_set, spec)),
        "plans": {
            plan.artifact.name: {
                "size_bytes": plan.artifact.size_bytes,
                "versions": plan.versions,
                "built_on": plan.built_on,
            }
            for plan in plan_set.plans
        },
        "samples": plan_set.samples.model_dump(mode="json") if plan_set.samples else None,
        "accepted_miss": accepted_miss(plan_set, graphs),
        "decoder": _decoder_facts(plan_set.decoder) if plan_set.decoder else None,
        "reference_bytes": plan_set.reference.artifact.size_bytes,
        "profiles": [
            {
                "name": facts.name,
                "latents": str(facts.profile.latents),
                "rows": str(facts.profile.rows),
                "text": str(facts.profile.text) if facts.profile.text else None,
                "plan": facts.plan.artifact.name,
                "parity": facts.parity.model_dump(),
            }
            for facts in plan_set.profiles
        ],
    }


def _decoder_facts(decoder: DecoderFacts) -> Facts:
    facts = decoder.model_dump(mode="json", exclude={"plan", "answers", "rows", "spec"})
    return facts | asdict(decoder.spec) | {"rows": str(decoder.rows), "plan": decoder.plan.artifact.name}
