"""Graphs and samples are what they were before the package was rebuilt: see `tests/yardstick.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elit_export.backends.openvino.cpu import cpu_features
from elit_export.bundle.manifest import SCHEMA
from elit_export.bundle.reading import Bundle
from elit_export.spec import FUSED, STEP, Precision
from elit_export.verify.check import verify_plan_set
from elit_export.verify.metrics import difference
from elit_export.verify.tolerances import TOLERANCES
from tests import yardstick

STORED = json.loads(yardstick.GRAPHS.read_text())
IS_SAME_CPU = STORED["cpu_features"] == cpu_features()
# The graphs that other tests export too; `python -m tests.yardstick check` makes all of them.
SHARED = [
    (backbone, name, precision)
    for backbone in yardstick.BACKBONES
    for name, precision in yardstick.NAMES
    if not precision.quantized and (name != FUSED or (backbone, precision) == ("ELIT-SiT", Precision.FP32))
]


@pytest.fixture(scope="module", autouse=True)
def same_libraries() -> None:
    """Graphs are of the versions that constraints.txt names."""
    here = yardstick.machine()["libraries"]
    if here != STORED["libraries"]:
        pytest.skip(f"stored with {STORED['libraries']}, installed are {here}")


@pytest.mark.parametrize("backbone", yardstick.BACKBONES)
def test_graphs_are_the_same_bytes(backbone: str, tmp_path: Path) -> None:
    """What constants are folded to depends on the processor, in the last bit."""
    compared = {"graph", "data"} if IS_SAME_CPU else {"graph"}
    for _, name, precision in [one for one in SHARED if one[0] == backbone]:
        found = yardstick.hashes_of(yardstick.graph_of(backbone, name, precision, tmp_path / precision.value / name))
        stored = STORED["sha256"][f"{backbone} {name} {precision.value}"]
        assert {what: found[what] for what in compared} == {what: stored[what] for what in compared}, (name, precision)


@pytest.fixture(scope="module")
def stored_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(yardstick.BUNDLE, tmp_path_factory.mktemp("stored") / "bundle"))


def test_the_stored_bundle_is_of_an_earlier_schema_and_opens(stored_bundle: Path) -> None:
    assert json.loads((stored_bundle / "manifest.json").read_text())["schema_version"] < SCHEMA
    manifest = Bundle.open(stored_bundle).manifest
    assert manifest.schema_version == SCHEMA
    assert {(graph.graph, graph.precision) for graph in manifest.graphs.values()} == {
        (name, Precision.FP32) for name in (STEP, "probe", "reuse", "time")
    }


def test_the_stored_bundle_verifies(stored_bundle: Path) -> None:
    bundle = Bundle.open(stored_bundle)
    found = verify_plan_set(bundle, bundle.manifest.plan_sets[0], checkpoint=None, on_comparison=lambda _: None)
    assert len(found) > 20
    assert all(comparison.met for comparison in found)


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "bundle"
    yardstick.build_text_bundle(folder)
    return folder


@pytest.mark.parametrize("config", yardstick.CONFIGS)
def test_samples_are_the_same(config: str, stored_bundle: Path, request: pytest.FixtureRequest) -> None:
    """The same bytes on the same kind of processor, and on another one as near as engines are to PyTorch."""
    bundle: Any = request.getfixturevalue("text_bundle") if config == "text" else stored_bundle
    with np.load(yardstick.SAMPLES) as arrays:
        stored = arrays[config]
    found = yardstick.sampled(bundle, config)
    if IS_SAME_CPU:
        np.testing.assert_array_equal(found, stored)
    assert difference(found, stored).sqnr_db >= TOLERANCES[Precision.FP32].trajectory_db
