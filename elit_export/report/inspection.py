"""What a checkpoint or a bundle holds, as plain facts.

Takes: a path.  Gives: a dict fit for JSON and for the tables.  May touch: the path (reading).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elit_export.bundle import Bundle
from elit_export.manifest import DecoderFacts, Manifest, PlanSet, budgets_of
from elit_export.models.cost import flops, usual_text
from elit_export.spec import DataFacts, ModelSpec, Range, listed
from elit_export.verify.parity import accepted_miss

Facts = dict[str, Any]


def inspect_path(path: str, **numbers: int | None) -> Facts:
    """Facts of a bundle folder or a checkpoint file; raises BundleError or CheckpointError."""
    if Path(path).is_dir():
        return bundle_facts(Bundle.open(path))
    return checkpoint_facts(path, **numbers)


def checkpoint_facts(path: str, **numbers: Any) -> Facts:
    from elit_export.checkpoint import checkpoint_path, load_checkpoint  # a machine that only runs has no torch

    file = checkpoint_path(path)
    model = load_checkpoint(path, **numbers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    own = {"kind": "checkpoint", "file": file.name, "size_bytes": file.stat().st_size, "parameters": parameters}
    return own | model_facts(model.spec, model.data)


def bundle_facts(bundle: Bundle) -> Facts:
    manifest, calibration = bundle.manifest, bundle.manifest.cache_calibration
    return {
        "kind": "bundle",
        "name": manifest.model.name,
        "schema_version": manifest.schema_version,
        "package_version": manifest.package_version,
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        **model_facts(manifest.model.spec, manifest.model.data),
        "graphs": {
            name: {"size_bytes": graph.artifact.size_bytes, "sqnr_db": graph.sqnr_db}
            for name, graph in manifest.graphs.items()
        },
        "plan_sets": [_plan_set_facts(plan_set, manifest) for plan_set in manifest.plan_sets],
        "cache_calibration": calibration.model_dump(mode="json") if calibration else None,
    }


def model_facts(spec: ModelSpec, data: DataFacts) -> Facts:
    shapes = {
        "tokens": spec.tokens,
        "groups": spec.groups,
        "latents_per_group": spec.latents,
        "split": f"{spec.head_depth}-{spec.core_depth}-{spec.tail_depth}",
    }
    return {"spec": spec.to_dict(), "shapes": shapes, "data": data.to_dict(), "budgets": budget_facts(spec)}


def budget_facts(spec: ModelSpec) -> list[Facts]:
    """The named budgets, largest first, with FLOPs of one image's forward pass, of `usual_text` where it has some."""
    text = usual_text(spec)
    full = flops(spec, spec.full, text=text).total
    return [
        {"name": name, "budget": str(budget), "flops": cost, "share_of_full": cost / full}
        for name, budget in spec.named_budgets.items()
        for cost in (flops(spec, budget, text=text).total,)
    ]


def _plan_set_facts(plan_set: PlanSet, manifest: Manifest) -> Facts:
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
                "plan": facts.plan.artifact.name,
                "parity": facts.parity.model_dump(),
            }
            for facts in plan_set.profiles
        ],
    }


def _decoder_facts(decoder: DecoderFacts) -> Facts:
    facts = decoder.model_dump(mode="json", exclude={"plan", "answers", "rows"})
    return facts | {"rows": str(Range(*decoder.rows)), "plan": decoder.plan.artifact.name}
