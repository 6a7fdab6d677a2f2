"""What several tests share: weights anyone can recompute, golden numbers, small models, fault injection."""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from elit_export.bundle.manifest import CacheCalibration, CacheFit
from elit_export.bundle.presets import Measured, Preset, PresetOptions
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.checkpoints.native import load_checkpoint
from elit_export.models.elit import Elit
from elit_export.models.registry import new_model
from elit_export.spec import Fit, ModelSpec, Precision, SolverError, SolverFacts, SolverTable

GOLDEN = Path(__file__).parent / "golden"
Array = npt.NDArray[Any]


# ---------------------------------------------------------------- weights by name


def tensor_by_name(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """A tensor that depends on (name, shape, seed) alone; no part of a model is zero or hidden."""
    stream = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0x7FFFFFFF)
    values = stream.standard_normal(shape)
    if re.search(r"([qk]_norm\.(scale|weight)|(txt_norm|norm(_added)?_[qk])\.weight)$", name):
        values = 1.0 + 0.1 * values
    elif "embed" in name.rsplit(".", 1)[-1] or name.endswith("embedding_table.weight"):
        values = 0.3 * values
    elif len(shape) > 1:
        values = values * (0.9 / np.sqrt(np.prod(shape[1:])))
    else:
        values = 0.1 * values
    return values.astype(np.float32)


def weights_by_name(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(tensor_by_name(name, tuple(shape), seed)) for name, shape in shapes.items()}


# ---------------------------------------------------------------- golden numbers


@dataclass(frozen=True)
class Golden:
    """Numbers of the reference implementation for one model."""

    name: str
    facts: dict[str, Any]

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(**self.facts["model"])

    @property
    def ema(self) -> dict[str, torch.Tensor]:
        return weights_by_name(self.facts["shapes"], self.facts["weights_seed"])

    @property
    def budgets(self) -> list[int]:
        return list(self.facts["budgets"])

    def arrays(self, what: str) -> dict[str, Array]:
        with np.load(GOLDEN / f"{self.name}_{what}.npz") as file:
            return dict(file)

    def save_pt(self, path: Path, **changes: Any) -> Path:
        """A file in the released format; `changes` replace top-level entries."""
        content = {
            "model": {name: tensor + 1 for name, tensor in self.ema.items()},  # not the ones to use
            "ema": self.ema,
            "opt": {"state": {}, "param_groups": []},
            "args": argparse.Namespace(model="ELIT-SiT-custom", encoder_depth=self.spec.head_depth),
            "steps": 1234,
        }
        torch.save(content | changes, path)
        return path

    def load(self, folder: Path) -> Elit:
        """The model, through the checkpoint reader."""
        path = self.save_pt(folder / f"{self.name}.pt")
        return load_checkpoint(path, num_heads=self.spec.num_heads, tail_depth=self.spec.tail_depth)


def golden(name: str) -> Golden:
    return Golden(name, json.loads((GOLDEN / f"{name}.json").read_text()))


def max_relative(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---------------------------------------------------------------- small models


def tiny_spec(**changes: Any) -> ModelSpec:
    """A pixel model that runs in a millisecond: 8×8 pixels, 16 tokens, 4 groups of 4 latents."""
    facts = {
        "in_channels": 1,
        "input_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "head_depth": 1,
        "core_depth": 2,
        "tail_depth": 1,
        "group_size": 2,
        "qk_norm": False,
        "mlp_ratio": 2.0,
        "num_classes": 3,
    }
    return ModelSpec(**(facts | changes))


def tiny_model(**changes: Any) -> Elit:
    """A tiny model with nothing zero in it."""
    model = new_model(tiny_spec(**changes))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights_by_name(shapes, seed=3))
    return model.eval()


# What makes a tiny spec one of each kind of transformer that the paper shows ELIT on, and of the released one.
VARIANTS: dict[str, dict[str, Any]] = {
    "ELIT-SiT": {},
    "ELIT-DiT": {"rope": True, "qk_norm": True, "qk_norm_kind": "rms", "in_channels": 16},
    "ELIT-U-ViT": {"backbone": "ELIT-U-ViT", "core_depth": 3},
    "ELIT-HDiT": {
        "backbone": "ELIT-HDiT",
        "core_depth": 3,
        "merge": 4,
        "coarse_depth": 1,
        "input_size": 16,
        "group_size": 4,
    },
}


# ---------------------------------------------------------------- a calibration for `teacache`


def fit_of(kept: int | None, slope: float = 1.0) -> CacheFit:
    return CacheFit(
        kept=kept,
        fit=Fit((0.0, slope, 0.0, 0.0, 0.0), low=0.0, high=10.0),
        r2=0.9,
        r2_same_steps=0.5,
        rank_same_steps=0.5,
        held_out_error=0.1,
        pairs=100,
    )


def calibrate(folder: Path, *fits: CacheFit, **changes: Any) -> Bundle:
    """Put a calibration into a bundle."""
    manifest = Bundle.open(folder).manifest
    facts: dict[str, Any] = {
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "fits": fits,
        "images": 4,
        "steps": (10,),
        "budgets": (4,),
        "guidance": ("none",),
        "seed": 0,
    }
    with writing(folder) as writer:
        calibration = CacheCalibration(**(facts | changes))
        return writer.commit(manifest.model_copy(update={"cache_calibration": calibration}))


# ---------------------------------------------------------------- presets and solver tables


def preset_of(bundle: Bundle, name: str = "fast", **changes: Any) -> Preset:
    """A preset of the bundle's first plan set; `changes` are of its fields, or of its options."""
    plan_set = bundle.manifest.plan_sets[0]
    facts = {
        "checkpoint_sha256": bundle.manifest.model.checkpoint_sha256,
        "target": plan_set.target,
        "precision": plan_set.precision,
        "command": "elit-export tune BUNDLE --latency 40ms",
    }
    return a_preset(name=name, **(facts | changes))


def a_preset(**changes: Any) -> Preset:
    options: dict[str, Any] = {"sampler": "ab3", "steps": 5, "guidance": "cfg:2", "guidance_interval": (0.25, 1.0)}
    facts: dict[str, Any] = {
        "name": "fast",
        "checkpoint_sha256": "0123456789abcdef" * 4,
        "target": "cpu",
        "precision": Precision.FP32,
        "command": "elit-export tune BUNDLE --latency 40ms",
        "measured": Measured(
            rows=1,
            ms=12.34567,
            speedup=10.5,
            engine_calls=5,
            images=64,
            seed=1000,
            sqnr_db=34.56,
            worst_sqnr_db=29.12,
            evaluator="fashion_classifier",
            distance=1.25,
            distance_error=0.0625,
            machine="a machine",
            date="2026-01-02",
        ),
    }
    own = {key: changes.pop(key) for key in list(changes) if key in Preset.model_fields}
    return Preset(**(facts | own), options=PresetOptions(**(options | changes)))


def a_solver(**changes: Any) -> SolverFacts:
    """Of two calls, beside the usual samplers."""

    def error(sampler: str, steps: int, median_db: float) -> SolverError:
        pooled_db, worst_db = median_db - 1, median_db - 6.5
        return SolverError(
            sampler=sampler, steps=steps, calls=steps, median_db=median_db, pooled_db=pooled_db, worst_db=worst_db
        )

    facts: dict[str, Any] = {
        "checkpoint_sha256": "0123456789abcdef" * 4,
        "table": SolverTable(times=(1.0, 0.5, 0.0), weights=((-0.5,), (0.1, -0.6))),
        "guidance": "cfg:2",
        "guidance_interval": None,
        "schedule": "full",
        "target": "cpu",
        "precision": Precision.FP32,
        "images": 60,
        "held_out_images": 64,
        "seed": 0,
        "error": error("solver:2", 2, 35.75),
        "compared": (error("ab3", 2, 26.25), error("euler", 50, 33.5)),
    }
    return SolverFacts(**(facts | changes))


# ---------------------------------------------------------------- bfloat16 on a CPU


def rounding_graph(graph: Path) -> onnx.ModelProto:
    """A bfloat16 graph rewritten for ONNX Runtime, which has no bfloat16 kernels on a CPU.

    Every bfloat16 value is computed in float32 from bfloat16 values and rounded to bfloat16 where it
    leaves its node, as on a GPU that sums in float32; inside a node, as in Attention, nothing is rounded.
    Run it without graph optimization, which would take the rounding for a pair of casts that cancel.
    """
    model = onnx.load(graph)
    _round_in(model.graph)
    return model


def _round_in(graph: onnx.GraphProto) -> None:
    """The graph, and the branches in it."""
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    nodes = [made for node in graph.node for made in _rounding_nodes(node, halves)]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def _rounding_nodes(node: onnx.NodeProto, halves: set[str]) -> list[onnx.NodeProto]:
    """The node in float32, then what rounds those of its outputs that are among the `halves`."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.GRAPH:
            _round_in(attribute.g)
    made = [node]
    for index, name in enumerate(node.output):
        if name in halves:
            node.output[index] = f"{name}/exact"
            made.append(helper.make_node("Cast", [f"{name}/exact"], [f"{name}/rounded"], to=TensorProto.BFLOAT16))
            made.append(helper.make_node("Cast", [f"{name}/rounded"], [name], to=TensorProto.FLOAT))
    return made
