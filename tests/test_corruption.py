"""Altered bytes and arbitrary values: refused with the package's own errors, or proven harmless."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elit_export import Pipeline
from elit_export.bundle.artifacts import Artifact
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.bundle.recipe import recipe_from_values
from elit_export.checkpoints.native import load_checkpoint, save_checkpoint
from elit_export.errors import BundleError, CheckpointError, ElitExportError, RecipeError
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.schedule import resolve_schedule
from elit_export.runtime.step_cache.policy import CachePolicy
from elit_export.spec import Budget
from tests.conftest import recipe_values
from tests.helpers import Golden, golden, tiny_spec

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes that use threads")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

# The same inputs at every run; `--hypothesis-profile=long` takes others at each, and many more (see conftest).
FEW = {} if settings.get_current_profile_name() == "long" else {"max_examples": 150, "derandomize": True}
fuzzed = settings(
    **FEW,
    deadline=None,  # deadlines measure how busy the machine is
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copied"))


# ---------------------------------------------------------------- altered artifacts


def flipped_once(path: Path, place: int, mask: int, stamp_ns: int) -> None:
    """Change one byte in place; the time of change moves on, as a hash is taken once for each."""
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ mask]))
    os.utime(path, ns=(stamp_ns, stamp_ns))


def altered_places(path: Path, times: int, seed: int) -> Iterator[int]:
    """The file with one random byte after another altered; it is whole again in the end."""
    chance = random.Random(f"{seed} {path.name}")
    stamp_ns = path.stat().st_mtime_ns
    for _ in range(times):
        place, mask = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
        for is_restoring in (False, True):
            stamp_ns += 1_000_000_000
            flipped_once(path, place, mask, stamp_ns)
            if not is_restoring:
                yield place


def artifacts_of(bundle: Bundle, kind: str) -> dict[str, Artifact]:
    return {artifact.name: artifact for artifact in bundle.manifest.artifacts() if artifact.kind == kind}


@pytest.mark.parametrize("name", ["step.onnx", "step.onnx.data"])
def test_a_plan_with_one_altered_byte_is_never_opened(copied: Path, name: str) -> None:
    """140 places in two files."""
    (path,) = copied.glob(f"plans/*/{name}")
    for _ in altered_places(path, times=70, seed=1):
        with pytest.raises(BundleError, match="altered since the build"):
            Pipeline.load(copied)
    Pipeline.load(copied).close()


@pytest.mark.parametrize("name", ["graphs/*/step.onnx", "graphs/*/step.onnx.data", "reference/*/*"])
def test_graphs_and_references_with_one_altered_byte_are_refused(copied: Path, name: str) -> None:
    """120 places in three files, which running does not need."""
    bundle = Bundle.open(copied)
    (path,) = copied.glob(name)
    artifact = artifacts_of(bundle, name.split("/")[0])[path.parent.name]
    for _ in altered_places(path, times=40, seed=2):
        with pytest.raises(BundleError, match="altered since the build"):
            bundle.verified(artifact)
    bundle.verified(artifact)
    Pipeline.load(copied).close()


# ---------------------------------------------------------------- a process of its own


def problems_in_child(cases: Iterable[tuple[str, Callable[[], str]]]) -> list[str]:
    """Run cases in a forked child; gives what each complained of, and which one brought the process down."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(writer, "w", buffering=1) as pipe, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries, about what the file says
                for name, case in cases:
                    pipe.write(f"begin {name}\n")
                    if problem := complaint(case):
                        pipe.write(f"problem {name}: {json.dumps(problem)}\n")
                pipe.write("done\n")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    problems = [line for line in lines if line.startswith("problem")]
    if status or lines[-1:] != ["done"]:
        problems.append(f"wait status {status} after: {lines[-1:]}")
    return problems


def complaint(case: Callable[[], str]) -> str:
    """What a case says, or the exception that should not have escaped."""
    try:
        return case()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} {str(error)[:200]} at {Path(last.filename).name}:{last.lineno}"


def mutations(content: bytes, places: Iterable[int], seed: int) -> Iterator[tuple[str, bytes]]:
    """One byte flipped or deleted, or everything from it on gone: four flips to one each of the others."""
    chance = random.Random(seed)
    for number, place in enumerate(places):
        head, tail = content[:place], content[place + 1 :]
        what = ("flip", "flip", "delete", "flip", "flip", "truncate")[number % 6]
        mask = chance.randrange(1, 256) if number % 2 else 1 << chance.randrange(8)
        changed = {"flip": head + bytes([content[place] ^ mask]) + tail, "delete": head + tail, "truncate": head}
        yield f"{what} at {place} (mask {mask})", changed[what]


# ---------------------------------------------------------------- altered manifests


def all_outputs(folder: Path) -> list[np.ndarray]:
    """A sampling that calls at two budgets under guidance, and its pictures."""
    with Pipeline.load(folder) as pipeline:
        made = pipeline.sample([0, 2], steps=2, schedule="0-0:1,1-1:full", guidance="ccfg:2@1")
        return [made.latents, made.images]


@linux
def test_an_altered_manifest_is_refused_or_harmless(copied: Path) -> None:
    """360 alterations of single bytes."""
    path = copied / MANIFEST
    content = path.read_bytes()
    expected = all_outputs(copied)
    places = random.Random(3).sample(range(len(content)), 360)

    def outcome(changed: bytes) -> str:
        path.write_bytes(changed)
        try:
            found = all_outputs(copied)
        except ElitExportError:
            return ""
        same = all(np.array_equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        return "" if same else "other samples"

    cases = (
        (f"{name} {near(content, name)}", lambda c=changed: outcome(c))
        for name, changed in mutations(content, places, seed=4)
    )
    problems = problems_in_child(cases)
    assert not problems, "\n".join(problems)


def near(content: bytes, name: str) -> str:
    place = int(name.split()[2])
    return repr(content[max(0, place - 20) : place + 20])


# ---------------------------------------------------------------- altered checkpoints


@pytest.fixture(scope="module")
def golden_g2() -> Golden:
    return golden("tiny_g2_qknorm")


def places_of_pt(path: Path, times: int) -> list[int]:
    """Half in the pickle and around it, a quarter each in the zip directory and anywhere."""
    chance = random.Random(5)
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        pickled = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        directory = archive.start_dir
    first, last = pickled.header_offset, pickled.header_offset + pickled.file_size + 100
    places = [chance.randrange(first, last) for _ in range(times // 2)]
    places += [chance.randrange(directory, size) for _ in range(times // 4)]
    return places + [chance.randrange(size) for _ in range(times // 4)]


def places_of_safetensors(content: bytes, times: int) -> list[int]:
    """Most in the header."""
    chance = random.Random(6)
    header = 8 + int.from_bytes(content[:8], "little")
    return [chance.randrange(16 if n % 8 == 0 else header if n % 4 else len(content)) for n in range(times)]


def load_outcome(path: Path, changed: bytes, shapes: dict[str, tuple[int, ...]], **numbers: int) -> str:
    path.unlink(missing_ok=True)
    path.write_bytes(changed)
    try:
        model = load_checkpoint(path, **numbers)
    except CheckpointError:
        return ""
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    total = sum(float(tensor.double().sum()) for tensor in model.state_dict().values())  # touches every number
    return "" if found == shapes and isinstance(total, float) else "other shapes"


@linux
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_altered_checkpoint_is_refused_or_has_the_right_shapes(
    golden_g2: Golden, tmp_path: Path, suffix: str
) -> None:
    """160 alterations of a released file and 400 of an own one."""
    spec = golden_g2.spec
    numbers = {"num_heads": spec.num_heads, "tail_depth": spec.tail_depth} if suffix == ".pt" else {}
    path = golden_g2.save_pt(tmp_path / "whole.pt", model={})
    model = load_checkpoint(path, num_heads=spec.num_heads, tail_depth=spec.tail_depth)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if suffix == ".pt":
        content, places = path.read_bytes(), places_of_pt(path, times=160)
    else:
        save_checkpoint(tmp_path / "own.safetensors", model)
        content = (tmp_path / "own.safetensors").read_bytes()
        places = places_of_safetensors(content, times=400)
    altered = tmp_path / f"altered{suffix}"
    cases = (
        (f"{name} {near(content, name)}", lambda c=changed: load_outcome(altered, c, shapes, **numbers))
        for name, changed in mutations(content, places, seed=7)
    )
    problems = problems_in_child(cases)
    assert not problems, "\n".join(problems)


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_arbitrary_bytes_are_no_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"any{suffix}"

    @fuzzed
    @given(
        start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", len(HEADER).to_bytes(8, "little"), HEADER]),
        rest=st.binary(),
    )
    @example(start=len(HEADER).to_bytes(8, "little") + HEADER, rest=bytes(4))
    @example(start=(2).to_bytes(8, "little"), rest=b"{}")
    def refused(start: bytes, rest: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(start + rest)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)

    refused()


def own_file(metadata: dict[str, str]) -> bytes:
    """A safetensors file of nothing but metadata."""
    header = json.dumps({"__metadata__": metadata}).encode()
    return len(header).to_bytes(8, "little") + header


# ---------------------------------------------------------------- arbitrary values

SPEC = tiny_spec()
DIGITS = "9" * 5000  # more than Python turns into an int
CACHES = ("teacache:", "static:", "static:every@", "static:mask@", "static:time@", "static:every@2,")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
near_text = st.text(max_size=30) | st.text("0123456789.:,-@of cfghalfqurten²٣", max_size=30)


def only_own_errors(work: Callable[[], object]) -> None:
    try:
        work()
    except ElitExportError:
        return


@fuzzed
@given(text=near_text)
@example(text=f"{DIGITS}-{DIGITS}:full")
@example(text=f"0-3:{DIGITS}")
@example(text=".-.:full")
def test_any_text_as_a_schedule_is_resolved_or_refused(text: str) -> None:
    only_own_errors(lambda: resolve_schedule(text, (1.0, 0.75, 0.5, 0.25, 0.0), SPEC))


@fuzzed
@given(text=near_text | st.builds("{}:{}".format, st.sampled_from(["cfg", "ccfg", "autoguidance", "none"]), near_text))
@example(text=f"cfg:{DIGITS}")
@example(text=f"ccfg:2@{DIGITS}")
def test_any_text_as_guidance_is_read_or_refused(text: str) -> None:
    only_own_errors(lambda: Guidance.parse(text, SPEC))


@fuzzed
@given(text=near_text | st.builds("{}{}".format, st.sampled_from(CACHES), near_text))
@example(text=f"static:every@{DIGITS}")
@example(text=f"teacache:{DIGITS}")
@example(text=f"static:time@1,max_skip={DIGITS}")
@example(text=f"static:{DIGITS}")
@example(text="static:a\0b")
def test_any_text_as_a_cache_is_read_or_refused(text: str) -> None:
    only_own_errors(lambda: CachePolicy.parse(text))


@fuzzed
@given(text=near_text | st.integers(), of=st.integers(1, 300))
@example(text=DIGITS, of=4)
@example(text=f"0.{DIGITS}", of=4)
@example(text=f"{DIGITS}.5", of=4)
def test_anything_as_a_budget_is_read_or_refused(text: str | int, of: int) -> None:
    only_own_errors(lambda: Budget.parse(text, of))


@st.composite
def with_other_leaves(draw: st.DrawFn, values: Any) -> Any:
    """A copy of nested values in which up to three places, leaves or branches, hold something else."""
    changed = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(list(places_in(changed))))
        value_at(changed, way)[last] = draw(json_values)
    return changed


ALIKE: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-2, 40) | st.integers(),
    float: st.floats(),
    str: st.text(max_size=12),
}


@st.composite
def with_like_leaves(draw: st.DrawFn, values: Any) -> Any:
    """A copy in which one or two leaves hold another value of their type, which a schema seldom refuses."""
    changed = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from([way for way in places_in(values) if type(value_at(values, way)) in ALIKE]))
        holder = value_at(changed, way)
        holder[last] = draw(ALIKE[type(holder[last])])
    return changed


def value_at(values: Any, way: Iterable[Any]) -> Any:
    for key in way:
        values = values[key]
    return values


def places_in(values: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if way:
        yield way
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield from places_in(value, (*way, key))


RECIPE: dict[str, object] = {
    **recipe_values(Path("tiny.safetensors")),
    "architecture": {"num_heads": 2},
    "profiles": [{"name": "high", "latents": {"min": 3, "opt": 4, "max": 4}}],
}


@fuzzed
@given(values=with_other_leaves(RECIPE) | json_values)
def test_any_values_as_a_recipe_are_read_or_refused(values: Any) -> None:
    try:
        recipe_from_values(values, "test").profiles_for(SPEC)
    except RecipeError:
        return


def test_any_values_as_a_manifest_are_read_or_refused(copied: Path) -> None:
    """As far as the library that opens the plans."""
    path = copied / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[OWN_HASH]

    def changed(**facts: Any) -> Any:
        (plan_set,) = manifest["plan_sets"]
        return manifest | {"plan_sets": [plan_set | facts]}

    @fuzzed
    @given(values=with_like_leaves(manifest) | with_other_leaves(manifest) | json_values)
    @example(values=changed(options={"threads": 10**30}))
    @example(values=changed(options={"threads": 2**31 - 1}))
    @example(values=changed(options={"threads": -1}))
    @example(values=changed(versions={"onnxruntime": f"{DIGITS}.²"}))
    def loaded(values: Any) -> None:
        # With its hash made right, so that what lies behind it is reached.
        path.write_text(manifest_text(values) if isinstance(values, dict) else json.dumps(values))
        only_own_errors(lambda: Pipeline.load(copied, allow_unverified=True).close())

    loaded()


@pytest.mark.parametrize("threads", [10**30, 2**31, 1025, -1])
def test_threads_that_no_machine_has_are_refused_by_name(copied: Path, threads: int) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    del manifest[OWN_HASH]
    manifest["plan_sets"][0]["options"]["threads"] = threads
    (copied / MANIFEST).write_text(manifest_text(manifest))
    with pytest.raises(BundleError, match=rf"threads: input should be .* is {threads}; .*recipe.*elit-export build"):
        Pipeline.load(copied)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"schema_version": 1' + b"0" * 5000 + b"}", id="long number"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b"NaN", id="NaN"),
    ],
)
def test_manifests_that_no_json_reader_likes_are_refused(copied: Path, content: bytes) -> None:
    (copied / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"build it again|newer"):
        Bundle.open(copied)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        pytest.param({"spec": "[" * 100_000}, id="deep"),
        {"spec": "[]", "data": "[]"},
        {"spec": "{}", "data": "null"},
        {"spec": json.dumps(SPEC.to_dict()), "data": "[]"},
        {"spec": json.dumps(SPEC.to_dict()), "data": '{"kind": []}'},
        {"spec": json.dumps(SPEC.to_dict() | {"mlp_ratio": float("inf")}), "data": '{"kind": "pixels"}'},
        {"spec": json.dumps(SPEC.to_dict() | {"mlp_ratio": -1}), "data": '{"kind": "pixels"}'},
        {"spec": json.dumps(SPEC.to_dict() | {"num_classes": 10**30}), "data": '{"kind": "pixels"}'},
        {"spec": json.dumps(SPEC.to_dict() | {"hidden_size": 4 * 10**18}), "data": '{"kind": "pixels"}'},
    ],
)
def test_odd_metadata_of_weights_are_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(own_file({"format": "elit_export/1"} | metadata))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
