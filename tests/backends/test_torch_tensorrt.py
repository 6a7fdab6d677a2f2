"""What Torch-TensorRT is asked for. The library cannot be imported without a GPU: a stand-in keeps what it is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from elit_export.backends import BACKENDS
from elit_export.backends.protocols import GraphFile
from elit_export.backends.torch_tensorrt.options import TorchTensorRTTarget
from elit_export.bundle.manifest import Graph
from elit_export.bundle.store import writing
from elit_export.compiler import stages
from elit_export.errors import BundleError
from elit_export.graphs.program import export_program
from elit_export.models.elit import Elit
from elit_export.spec import CACHE_GRAPHS, STEP, Precision, Profile, Range
from tests.bundle.test_trust import TORCH_SAYS, write_hostile
from tests.helpers import tiny_model
from tests.text_models import text_model

ROWS, LATENTS, TEXT = Range(1, 2, 8), Range(4, 16, 16), Range(2, 5, 9)
TARGET = TorchTensorRTTarget(backend="torch-tensorrt", precision=Precision.FP32)
BUILD = "elit_export.backends.torch_tensorrt.build"


class Library(ModuleType):
    """Its `Input` is what it was made with; what it compiles, it keeps."""

    __version__ = "0"

    def __init__(self) -> None:
        super().__init__("torch_tensorrt")
        self.programs: list[Any] = []
        self.inputs: list[Any] = []
        self.dynamo = SimpleNamespace(compile=self._compile)

    def Input(self, **facts: Any) -> SimpleNamespace:  # noqa: N802 - the library's own name
        return SimpleNamespace(**facts)

    def _compile(self, program: Any, *, arg_inputs: list[Any], **_: bool) -> str:
        self.programs.append(program)
        self.inputs += arg_inputs
        return "compiled"

    def save(self, compiled: str, path: str, **_: Any) -> None:
        Path(path).write_text(compiled)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The stand-in, for a builder that is imported over it."""
    made = Library()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", made)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.delitem(sys.modules, BUILD, raising=False)
    yield made
    sys.modules.pop(BUILD, None)


def asked(library: Library, model: Elit, graph: str, profile: Profile, folder: Path) -> dict[str, list[Any]]:
    """The least, usual and largest shape of each input, which fit those of the program in order and kind."""
    file = GraphFile(export_program(model, graph, folder), model.spec.graph(graph))
    shares: list[float] = []
    built = BACKENDS["torch-tensorrt"].builder().build_plan(file, folder, [profile], TARGET, None, shares.append)
    assert (folder / built.file).read_text() == "compiled"
    assert shares == [1.0]
    (program,) = library.programs
    for tensor, found in zip(taken_by(program), library.inputs, strict=True):
        fixed = [size if isinstance(size, int) else None for size in tensor.shape]
        for shape in (found.min_shape, found.opt_shape, found.max_shape):
            assert [size if known else None for size, known in zip(shape, fixed, strict=True)] == fixed
        assert found.dtype == tensor.dtype
    return {found.name: [found.min_shape, found.opt_shape, found.max_shape] for found in library.inputs}


def taken_by(program: Any) -> list[Any]:
    names = program.graph_signature.user_inputs
    return [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def test_text_has_a_range_of_its_own(library: Library, tmp_path: Path) -> None:
    found = asked(library, text_model(core_depth=1, tail_depth=0), STEP, Profile("full", LATENTS, ROWS, TEXT), tmp_path)
    pairs = list(zip(ROWS.corners(), TEXT.corners(), strict=True))
    assert found["text"] == [(rows, tokens, 24) for rows, tokens in pairs]
    assert found["text_mask"] == pairs
    assert found["x"] == [(rows, 4, 16, 16) for rows in ROWS.corners()]
    assert found["t"] == [(rows,) for rows in ROWS.corners()]
    assert found["latents"] == [(kept,) for kept in LATENTS.corners()]


@pytest.mark.parametrize("graph", CACHE_GRAPHS)
def test_graphs_without_text_have_rows_alone(library: Library, tmp_path: Path, graph: str) -> None:
    model = text_model()
    found = asked(library, model, graph, Profile(graph, Range(1, 1, 1), ROWS), tmp_path)
    for tensor in model.spec.graph(graph).inputs:
        assert found[tensor.name] == [(rows, *tensor.dims[1:]) for rows in ROWS.corners()]


def test_models_of_classes_have_rows_and_latents(library: Library, tmp_path: Path) -> None:
    found = asked(library, tiny_model(), STEP, Profile("full", Range(1, 2, 4), ROWS), tmp_path)
    assert found["y"] == [(rows,) for rows in ROWS.corners()]
    assert found["latents"] == [(1,), (2,), (4,)]


@pytest.mark.filterwarnings("ignore")  # torch's, of a format that it calls old
@pytest.mark.parametrize(("trust", "refused"), [(False, BundleError), (True, TORCH_SAYS)])
def test_a_build_reads_no_graph_that_somebody_else_left(
    library: Library, tmp_path: Path, trust: bool, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was found in the bundle under the right key: the builder would have torch unpickle it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    marker, facts = tmp_path / "it ran", SimpleNamespace(spec=tiny_model().spec)
    with writing(tmp_path / "bundle") as store, store.staged() as shared:
        with store.staged() as staged:
            write_hostile(staged / "step.pt2", marker)
            artifact = store.adopt(staged, "graphs", "step")
        given: Any = {"key": "k", "graph": STEP, "precision": Precision.FP32, "file": "step.pt2", "versions": {}}
        keys = SimpleNamespace(plan=lambda *_, **__: "key")
        job: Any = SimpleNamespace(
            options=TARGET, store=store, keys=keys, trust=trust, facts=facts, inputs=None, target="t"
        )
        with pytest.raises(refused) as caught:
            stages._plan(
                job,
                facts.spec.graph(STEP),
                Graph(artifact=artifact, **given),
                [Profile("full", LATENTS, ROWS)],
                shared,
                (0.0, 1.0),
            )
    assert marker.exists() is trust
    if not trust:
        assert "--trust" in str(caught.value)
