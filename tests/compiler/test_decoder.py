"""From a decoder's folder to pictures: built, compared, sampled, moved, built again. All real."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from elit_export import Pipeline, compile_bundle
from elit_export.backends import BACKENDS
from elit_export.backends.onnxruntime.engine import OnnxRuntimeEngine
from elit_export.backends.protocols import FunctionEngine, GraphFile
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.bench.memory import held_bytes
from elit_export.bench.timing import resident_bytes
from elit_export.bundle import keys
from elit_export.bundle.manifest import DecoderFacts, Parity
from elit_export.bundle.reading import MANIFEST, OWN_HASH, Bundle, manifest_text
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.checkpoints.native import save_checkpoint
from elit_export.checkpoints.vae import read_decoder
from elit_export.checkpoints.vae_decoder import VaeDecoder, load_decoder
from elit_export.cli import main
from elit_export.cli.demo import demo_configs, demo_rows
from elit_export.cli.tables.inspect import _parity_row
from elit_export.compiler.build import NOTHING_CHANGED
from elit_export.errors import BundleError, CheckpointError, ParityError, RecipeError
from elit_export.graphs import formats
from elit_export.graphs.export import export_decoder
from elit_export.graphs.program import export_decoder_program
from elit_export.runtime.bank import EngineBank
from elit_export.runtime.images import grid
from elit_export.runtime.opening import check_verified, open_bank
from elit_export.runtime.vae import decoder_input
from elit_export.spec import DataFacts, DecoderSpec, Precision, Profile, Range, by_channel_text
from elit_export.verify.check import verify_plan_set
from elit_export.verify.compare import require
from elit_export.verify.parity import compared, comparison_count, load_reference
from tests.compiler.test_build import reads_of_a_build_that_does_nothing, sources_in
from tests.conftest import recipe_values
from tests.helpers import max_relative, tiny_model
from tests.vae import LATENTS, MAKERS, decoded, load_vae, pictures, save_vae, torch_decoder

ROOT = Path(__file__).parent.parent.parent
ROWS = {"min": 1, "opt": 2, "max": 4}
DECODE = ["build decode", "verify"]


# ---------------------------------------------------------------- what is built once


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoding")


@pytest.fixture(scope="module", autouse=True)
def decoders_exported_once(base: Path) -> Iterator[None]:
    """Builds share real exports of decoders, as all tests do those of models."""

    def remembered(decoder: VaeDecoder, spec: DecoderSpec, target: Path) -> Path:
        digest = hashlib.sha256(str(spec).encode())
        for tensor in decoder.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        made = base / "exports" / digest.hexdigest()[:16]
        if not made.is_dir():
            export_decoder(decoder, spec, made)
        shutil.copytree(made, target, dirs_exist_ok=True)
        return target / "decode.onnx"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "export_decoder", remembered)
        yield


@pytest.fixture(scope="module")
def checkpoints(base: Path) -> dict[int, Path]:
    """Models of 8 × 8 latents, by channels."""
    found = {channels: base / f"c{channels}.safetensors" for channels in LATENTS}
    for channels, path in found.items():
        model = tiny_model(in_channels=channels, core_depth=1, tail_depth=0)
        model.data = LATENTS[channels]
        save_checkpoint(path, model)
    return found


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    """One of each decoder. Do not change them: copy them first."""
    return {name: save_vae(name, base / name) for name in MAKERS}


def recipe_of(checkpoint: Path, folder: Path | None, **changes: Any) -> Recipe:
    values: Any = recipe_values(checkpoint)
    values["targets"]["ov"] = {"backend": "openvino", "precision": "fp32", "threads": 1}
    if folder:
        values["decoder"] = {"folder": str(folder), "rows": ROWS} | changes
    return recipe_from_values(values, "test")


class Built:
    """A bundle with a decoder, for both backends."""

    def __init__(self, base: Path, name: str, checkpoint: Path, folder: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.channels = read_decoder(folder).vae.channels
        for target in ("cpu", "ov"):
            self.bundle = compile_bundle(recipe_of(checkpoint, folder), target, out=base / f"bundle-{name}")
        self.vae = load_vae(folder)

    def latents(self, images: int) -> np.ndarray:
        return np.random.default_rng(images).standard_normal((images, self.channels, 8, 8))

    def facts(self, target: str) -> DecoderFacts:
        return facts_of(self.bundle, target)


def facts_of(bundle: Bundle, target: str = "cpu") -> DecoderFacts:
    found = next(found.decoder for found in bundle.manifest.plan_sets if found.target == target)
    assert found
    return found


@pytest.fixture(scope="module", params=MAKERS)
def built(request: pytest.FixtureRequest, base: Path, checkpoints: dict[int, Path], folders: dict[str, Path]) -> Built:
    name: str = request.param
    return Built(base, name, checkpoints[read_decoder(folders[name]).vae.channels], folders[name])


@pytest.fixture(scope="module")
def kl4(base: Path, checkpoints: dict[int, Path], folders: dict[str, Path]) -> Bundle:
    """Do not change it: copy it first."""
    return compile_bundle(recipe_of(checkpoints[4], folders["kl4"]), "cpu", out=base / "kl4-alone")


@pytest.fixture
def copied(kl4: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kl4.folder, tmp_path / "copied"))


def elit(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("target", ["cpu", "ov"])
def test_engines_say_what_diffusers_says(built: Built, target: str) -> None:
    with Pipeline.load(built.bundle.folder, target=target) as pipeline:
        spec = built.facts(target).spec
        for images in (1, 2, 3, 4):
            latents = built.latents(images)
            z = decoder_input(latents, spec)
            assert max_relative(pipeline.bank.decode(z), decoded(built.vae, latents)) <= 1e-4


@pytest.mark.parametrize("target", ["cpu", "ov"])
def test_a_build_compares_the_decoder_with_diffusers(built: Built, target: str) -> None:
    facts = built.facts(target)
    assert facts.parity.status == "passed"
    assert (facts.parity.sqnr_db or 0) >= 115
    assert (facts.parity.max_relative or 1) <= 1e-5
    assert facts.answers.rows == (1, 2)
    assert (facts.spec.side, facts.rows, facts.sha256) == (8, Range(1, 2, 4), read_decoder(built.folder).sha256)


def test_targets_share_graph_and_answers(built: Built) -> None:
    one, other = (built.facts(target) for target in ("cpu", "ov"))
    assert one.answers == other.answers
    assert one.plan != other.plan
    assert [name for name in built.bundle.manifest.graphs if name.startswith("decode")] == ["decode-fp32"]


def test_pictures_are_those_of_diffusers(built: Built) -> None:
    with Pipeline.load(built.bundle.folder, target="cpu") as pipeline:
        latents = built.latents(6)  # more than a call takes
        found, expected = pipeline.decode(latents), pictures(decoded(built.vae, latents))
        assert np.abs(found.astype(int) - expected).max() <= 1  # a half may round either way
        assert (found == expected).mean() > 0.999


@pytest.mark.parametrize("target", ["cpu", "ov"])
def test_what_an_engine_gives_belongs_to_the_caller(built: Built, target: str) -> None:
    with Pipeline.load(built.bundle.folder, target=target) as pipeline:
        z = built.latents(2).astype(np.float32)
        first = pipeline.bank.decode(z)
        before = first.copy()
        pipeline.bank.decode(z + 1)
        assert np.array_equal(first, before)


def test_a_decoder_that_departs_is_a_miss_and_never_accepted(kl4: Bundle) -> None:
    plan_set = kl4.manifest.plan_sets[0].model_copy(update={"accepted": "why not"})
    with open_bank(kl4, plan_set) as bank:
        assert bank.decoder
        right = bank.decoder

        def off(inputs: Any) -> dict[str, Any]:
            return {"pixels": right(inputs)["pixels"] * np.float32(1 + 1e-4)}

        wrong = EngineBank(bank.slots, kl4.manifest.model.spec.budgets, Precision.FP32, bank.cache, FunctionEngine(off))
        found = list(compared(kl4, plan_set, wrong, load_reference(kl4, plan_set.reference)))
    assert len(found) == comparison_count(plan_set)
    missed = [comparison for comparison in found if not comparison.passed]
    assert [(comparison.part, comparison.point) for comparison in missed] == [
        ("graph decode", f"rows={rows} pixels") for rows in (1, 2)
    ]
    with pytest.raises(ParityError, match="graph decode, rows=1 pixels: SQNR 80") as refused:
        require(missed[0])
    assert "accept_below_tolerance" not in str(refused.value)  # it would not help


@pytest.fixture
def one_pixel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every answer of a decoder; too little for the SQNR to show."""
    run = OnnxRuntimeEngine.__call__

    def off(engine: OnnxRuntimeEngine, inputs: Any) -> Any:
        outputs = dict(run(engine, inputs))
        if "pixels" in outputs:
            pixels = np.array(outputs["pixels"])
            pixels[-1, 0, 3, 4] += 1.5e-4 * np.abs(pixels).max()
            outputs["pixels"] = pixels
        return outputs

    monkeypatch.setattr(OnnxRuntimeEngine, "__call__", off)


@pytest.mark.usefixtures("one_pixel_off")
def test_one_pixel_that_is_off_is_a_miss(kl4: Bundle) -> None:
    plan_set = kl4.manifest.plan_sets[0]
    found = verify_plan_set(kl4, plan_set, checkpoint=None, on_comparison=lambda _: None)
    missed = [comparison for comparison in found if not comparison.passed]
    assert [comparison.part for comparison in missed] == ["graph decode"] * 2
    assert all(comparison.margin_db > 0 for comparison in missed)
    told = r"max error 1\.5e-04 of the largest value\) misses 1e-04 of the largest value; .* 1\.6e-04 of it would have"
    with pytest.raises(ParityError, match=told) as refused:
        require(missed[0])
    assert "accept_below_tolerance" not in str(refused.value)
    done = elit("verify", kl4.folder)
    assert done.exit_code == 1
    assert "misses 1e-04 of the largest value" in " ".join(done.output.split())
    assert [_parity_row(comparison)[-1] for comparison in missed] == ["MISSES 1e-04 relative"] * 2


@pytest.mark.usefixtures("one_pixel_off")
def test_a_build_with_one_pixel_off_is_refused(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path]
) -> None:
    recipe = recipe_of(checkpoints[4], folders["kl4"], rows={"min": 1, "opt": 2, "max": 3})
    with pytest.raises(ParityError, match=r"graph decode, rows=1 pixels.*misses 1e-04 of the largest value"):
        compile_bundle(recipe, "cpu", out=copied)
    assert facts_of(Bundle.open(copied)).rows == Range(1, 2, 4)


# ---------------------------------------------------------------- a person's path


def test_sample_writes_pictures(built: Built, tmp_path: Path) -> None:
    """The PNG is what diffusers makes of the latents that lie beside it."""
    out = tmp_path / "made.png"
    done = elit("sample", built.bundle.folder, "--target", "cpu", "--out", out, "--labels", "0-2,1", "--steps", 3)
    assert done.exit_code == 0, done.output
    assert "made.png" in done.output
    with np.load(out.with_suffix(".npz")) as file:
        expected = grid([pictures(decoded(built.vae, file["latents"]))], zoom=2)
    with Image.open(out) as found:
        assert found.size == expected.size
        difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
    assert difference.max() <= 1
    assert np.asarray(expected).std() > 10


def test_a_recipe_file_builds_with_a_folder_beside_it(
    base: Path, checkpoints: dict[int, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["tiny4"], tmp_path / "parts" / "tiny4")
    lines = [
        f'name = "vae"\ncheckpoint = "{checkpoints[4]}"',
        "rows = { min = 1, opt = 2, max = 8 }",
        '[decoder]\nfolder = "parts/tiny4"',
        '[targets.cpu]\nbackend = "onnxruntime"\ndevice = "cpu"\nprecision = "fp32"',
    ]
    (tmp_path / "vae.toml").write_text("\n".join(lines))
    done = elit("build", tmp_path / "vae.toml", "--out", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    assert "decoder of target cpu" in done.output
    facts = facts_of(Bundle.open(tmp_path / "bundle"))
    assert (facts.class_name, facts.rows) == ("AutoencoderTiny", Range(1, 1, 4))


def test_without_a_decoder_sample_names_the_remedy(checkpoints: dict[int, Path], tmp_path: Path, base: Path) -> None:
    bundle = compile_bundle(recipe_of(checkpoints[4], None), "cpu", out=tmp_path / "bare")
    done = elit("sample", bundle.folder, "--out", tmp_path / "x.png", "--steps", 3)
    assert done.exit_code == 0
    said = " ".join(done.output.split())
    assert "latents of a VAE (small): for a PNG, name its folder in the recipe ([decoder] folder = …) and build" in said
    assert not (tmp_path / "x.png").exists()


def test_the_demo_draws_with_it(kl4: Bundle, tmp_path: Path) -> None:
    done = elit("demo", "--bundle", kl4.folder, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    with Pipeline.load(kl4.folder) as pipeline:
        rows = list(demo_rows(pipeline, demo_configs(pipeline)))
        assert np.array_equal(rows[0].images, pipeline.decode(rows[0].sample.latents))
    with Image.open(tmp_path / "demo.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(grid([row.images for row in rows], zoom=3)))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            {"spec": {"scale": [1.0, 1.0, 0.0, 1.0]}},
            r"\.spec: .*: scales must be finite and positive",
        ),
        ({"spec": {"scale": [-1.0] * 4}}, r"\.spec: .*: scales must be finite and positive"),
        ({"spec": {"scale": 1.0}}, r"\.spec\.scale"),
        ({"spec": {"scale": [1.0] * 3}}, r"\.spec: Value error, 3 scales and 4 shifts of a decoder of 4 channels"),
        ({"spec": {"shift": [0.0] * 5}}, r"\.spec: Value error, 4 scales and 5 shifts of a decoder of 4 channels"),
        ({"rows": [4, 2, 1]}, r"\.rows"),
        ({"rows": [0, 1, 1]}, r"\.rows"),
    ],
)
def test_facts_that_cannot_be_are_found_before_anything_is_opened(
    copied: Path, opened: list[str], damage: dict[str, Any], told: str
) -> None:
    values = json.loads((copied / MANIFEST).read_text())
    del values[OWN_HASH]
    decoder = values["plan_sets"][0]["decoder"]
    decoder |= damage | {"spec": decoder["spec"] | damage.get("spec", {})}
    (copied / MANIFEST).write_text(manifest_text(values))
    with pytest.raises(BundleError, match=rf"damaged: plan_sets\.0\.decoder{told}"):
        Pipeline.load(copied)
    assert not opened


def test_inspect_shows_the_decoder(built: Built) -> None:
    said = " ".join(re.sub(r"[│\s]+", " ", elit("inspect", built.bundle.folder).output).split())
    facts = built.facts("cpu")
    scale, shift = by_channel_text(facts.spec.scale), by_channel_text(facts.spec.shift)
    for told in (facts.class_name, f"latents / {scale} + {shift}, {facts.spec.channels} channels"):
        assert told in said
    listed = json.loads(elit("inspect", built.bundle.folder, "--json", "-").stdout)["plan_sets"][0]["decoder"]
    assert (listed["channels"], listed["side"], listed["factor"]) == (facts.spec.channels, 8, facts.spec.factor)
    assert (listed["scale"], listed["shift"]) == (list(facts.spec.scale), list(facts.spec.shift))


def test_verify_has_a_row_of_it(built: Built) -> None:
    done = elit("verify", built.bundle.folder, "--target", "ov", "--json", "-")
    assert done.exit_code == 0
    own = [row for row in json.loads(done.stdout) if row["part"] == "graph decode"]
    assert [(row["point"], row["passed"]) for row in own] == [("rows=1 pixels", True), ("rows=2 pixels", True)]


def test_verify_against_the_checkpoint_keeps_the_answers_of_the_decoder(
    kl4: Bundle, checkpoints: dict[int, Path]
) -> None:
    plan_set = kl4.manifest.plan_sets[0]
    found = verify_plan_set(kl4, plan_set, checkpoint=checkpoints[4], on_comparison=lambda _: None)
    assert len(found) == comparison_count(plan_set)
    assert all(comparison.passed for comparison in found)


MOVED = """
import sys
from collections.abc import Iterator
from pathlib import Path
import numpy as np
from elit_export import Pipeline
from elit_export.cli import main
with Pipeline.load(sys.argv[1]) as pipeline:
    np.save(sys.argv[2], pipeline.decode(np.load(sys.argv[3])))
main(["verify", sys.argv[1]], standalone_mode=False)
heavy = {"torch", "diffusers", "onnx", "safetensors"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""


def test_a_moved_bundle_needs_neither_folder_nor_torch(
    kl4: Bundle, folders: dict[str, Path], checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["kl4"], tmp_path / "kl4"))
    made = compile_bundle(recipe_of(checkpoints[4], folder), "cpu", out=tmp_path / "made")
    latents = np.random.default_rng(1).standard_normal((3, 4, 8, 8))
    with Pipeline.load(made.folder) as pipeline:
        expected = pipeline.decode(latents)
    np.save(tmp_path / "latents.npy", latents)
    made.folder.rename(tmp_path / "moved")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "moved" / "graphs")
    files = [tmp_path / "moved", tmp_path / "pictures.npy", tmp_path / "latents.npy"]
    done = subprocess.run(
        [sys.executable, "-c", MOVED, *map(str, files)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "pictures.npy"), expected)


def test_large_samples_are_decoded_in_tiles(
    checkpoints: dict[int, Path], folders: dict[str, Path], copied: Path
) -> None:
    recipe = recipe_of(checkpoints[4], folders["kl4"], tile=4)
    compile_bundle(recipe, "cpu", out=copied)
    assert facts_of(Bundle.open(copied)).spec.side == 4
    latents = np.random.default_rng(1).standard_normal((2, 4, 8, 8))
    with Pipeline.load(copied) as pipeline:
        found, expected = pipeline.decode(latents), torch_decoder(folders["kl4"], 4)(latents)
    assert np.abs(found.astype(int) - expected).max() <= 1
    untiled = pictures(decoded(load_vae(folders["kl4"]), latents))
    assert np.abs(found.astype(int) - untiled).max() > 1


# ---------------------------------------------------------------- what it takes


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plans that are opened, by the first word of their folder."""
    names: list[str] = []
    init = OnnxRuntimeEngine.__init__

    def noted(engine: OnnxRuntimeEngine, path: Path, **options: Any) -> None:
        names.append(path.parent.name.split("-")[0])
        init(engine, path, **options)

    monkeypatch.setattr(OnnxRuntimeEngine, "__init__", noted)
    return names


def test_the_decoder_is_opened_by_the_first_decode_alone(kl4: Bundle, opened: list[str]) -> None:
    with Pipeline.load(kl4.folder) as pipeline:
        latents = pipeline.sample([0, 1], steps=3).latents
        assert "step" in opened
        assert "decode" not in opened
        first, second = pipeline.decode(latents), pipeline.decode(latents)
        assert np.array_equal(first, second)
        assert opened.count("decode") == 1


def test_a_damaged_decoder_is_found_when_a_bundle_is_loaded(copied: Path) -> None:
    (plan,) = copied.glob("plans/decode*/*.onnx")
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(BundleError, match="plans/decode"):
        Pipeline.load(copied)


def test_a_decoder_that_changed_since_the_bundle_was_loaded_is_not_opened(copied: Path, opened: list[str]) -> None:
    (plan,) = copied.glob("plans/decode*/*.onnx")
    with Pipeline.load(copied) as pipeline:
        plan.write_bytes(plan.read_bytes()[:-1])
        with pytest.raises(BundleError, match="plans/decode"):
            pipeline.decode(np.zeros((1, 4, 8, 8)))
    assert "decode" not in opened


def test_the_memory_of_a_bank_is_measured_without_the_decoder(kl4: Bundle, opened: list[str]) -> None:
    if resident_bytes() is None:
        pytest.skip("only Linux tells its memory")
    held_bytes(kl4.folder, kl4.manifest.plan_sets[0], trust=False)
    assert "step" in opened
    assert "decode" not in opened


def test_the_plans_of_a_model_do_not_count_the_decoder(kl4: Bundle) -> None:
    plan_set = kl4.manifest.plan_sets[0]
    assert plan_set.decoder
    alone = plan_set.model_copy(update={"decoder": None})
    assert plan_set.model_bytes == alone.model_bytes == sum(plan.artifact.size_bytes for plan in alone.plans)
    assert plan_set.decoder.plan.artifact.size_bytes > 0


def test_a_bench_measures_the_decoder_by_itself(kl4: Bundle) -> None:
    done = elit("bench", kl4.folder, "--rows", 2, "--rounds", 1, "--no-sampling", "--json", "-")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    plan_set = kl4.manifest.plan_sets[0]
    assert plan_set.decoder
    assert facts["plan_bytes"] == plan_set.model_bytes
    assert facts["decode"]["plan_bytes"] == plan_set.decoder.plan.artifact.size_bytes
    assert facts["decode"]["images"] == 1
    assert facts["decode"]["ms_per_image"] > 0


# ---------------------------------------------------------------- a second build


def stages_of(folder: Path, recipe: Recipe, target: str = "cpu") -> list[str]:
    stages: list[str] = []
    compile_bundle(recipe, target, out=folder, progress=lambda stage, _: stages.append(stage))
    Pipeline.load(folder, target=target).close()
    return [stage for stage in dict.fromkeys(stages) if not stage.startswith("verified")]


def test_nothing_changed_does_nothing(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    assert stages_of(copied, recipe_of(checkpoints[4], folders["kl4"])) == [NOTHING_CHANGED]
    elsewhere = shutil.copytree(folders["kl4"], tmp_path / "elsewhere")  # its content counts, not its place
    assert stages_of(copied, recipe_of(checkpoints[4], Path(elsewhere))) == [NOTHING_CHANGED]


def test_a_build_that_does_nothing_reads_the_manifest_and_every_source_file_once(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are in the key of a decoder and in others."""
    recipe = recipe_of(checkpoints[4], folders["kl4"])
    reads = reads_of_a_build_that_does_nothing(copied, recipe, monkeypatch)
    assert reads[copied / MANIFEST] == 1
    sources = sources_in(reads)
    assert {"checkpoints/vae.py", "compiler/decoder.py", "graphs/export.py", "runtime/vae.py"} <= set(sources)
    assert set(sources.values()) == {1}


def test_another_decoder_makes_its_own_part_again(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path]
) -> None:
    stages = ["read decoder", "export graph decode", "decoder reference", *DECODE]
    assert stages_of(copied, recipe_of(checkpoints[4], folders["tiny4"])) == stages
    with Pipeline.load(copied) as pipeline:
        assert pipeline.decode(np.zeros((1, 4, 8, 8))).shape == (1, 32, 32, 3)


def test_other_weights_of_the_same_shape_make_it_again(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_vae("kl4", tmp_path / "kl4", seed=12)
    stages = ["read decoder", "export graph decode", "decoder reference", *DECODE]
    assert stages_of(copied, recipe_of(checkpoints[4], folder)) == stages
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8))
    with Pipeline.load(copied) as pipeline:
        expected = pictures(decoded(load_vae(folder), latents))
        assert np.abs(pipeline.decode(latents).astype(int) - expected).max() <= 1


def with_scale(folder: Path, copy: Path, scale: float) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"scaling_factor": scale}))
    return copy


def test_another_scale_asks_diffusers_again(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a model that does not say what its VAE is; one that does refuses."""
    model = tiny_model(in_channels=4)
    model.data = DataFacts(kind="vae", vae="unknown")
    save_checkpoint(tmp_path / "c4.safetensors", model)
    compile_bundle(recipe_of(tmp_path / "c4.safetensors", folders["kl4"]), "cpu", out=tmp_path / "made")
    folder = with_scale(folders["kl4"], tmp_path / "kl4", 0.5)
    assert "decoder reference" in stages_of(tmp_path / "made", recipe_of(tmp_path / "c4.safetensors", folder))
    assert facts_of(Bundle.open(tmp_path / "made")).spec.scale == (0.5,) * 4


def test_another_scale_than_the_model_is_refused_and_nothing_is_built(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    before = Bundle.open(copied).manifest
    folder = with_scale(folders["kl4"], tmp_path / "kl4", 0.13025)
    with pytest.raises(RecipeError, match=r"has the scale 0\.13025, the latents of this model \(small\) have 0\.18215"):
        compile_bundle(recipe_of(checkpoints[4], folder), "cpu", out=copied)
    assert Bundle.open(copied).manifest == before


@pytest.mark.parametrize("file", ["compiler/decoder.py", "checkpoints/vae_decoder.py", "checkpoints/vae.py"])
def test_changed_code_makes_its_graph_and_answers_again(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """They come out the same, so no plan is built again."""
    real = keys.code
    monkeypatch.setattr(keys, "code", lambda *places: real(*places) + ("changed" if file in places else ""))
    stages = ["read decoder", "export graph decode", "decoder reference"]
    assert stages_of(copied, recipe_of(checkpoints[4], folders["kl4"]))[:3] == stages


def test_other_rows_build_the_plan_alone(copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path]) -> None:
    rows = {"min": 1, "opt": 2, "max": 8}
    assert stages_of(copied, recipe_of(checkpoints[4], folders["kl4"], rows=rows)) == DECODE
    more = {"min": 1, "opt": 3, "max": 8}
    stages = ["read decoder", "decoder reference", *DECODE]
    assert stages_of(copied, recipe_of(checkpoints[4], folders["kl4"], rows=more)) == stages


def test_a_recipe_without_it_drops_it(copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path]) -> None:
    assert stages_of(copied, recipe_of(checkpoints[4], None)) == ["verify"]
    manifest = Bundle.open(copied).manifest
    assert manifest.plan_sets[0].decoder is None
    assert not [name for name in manifest.graphs if name.startswith("decode")]
    assert not [path.name for path in copied.glob("*/*") if path.name.startswith("decode")]
    made_again = stages_of(copied, recipe_of(checkpoints[4], folders["kl4"]))
    assert made_again == ["read decoder", "export graph decode", "decoder reference", *DECODE]


@pytest.mark.parametrize("kind", ["graphs", "plans", "reference"])
def test_what_is_gone_from_disk_is_made_again(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path], kind: str
) -> None:
    for path in (copied / kind).glob("decode*"):
        shutil.rmtree(path)
    recipe = recipe_of(checkpoints[4], folders["kl4"])
    assert stages_of(copied, recipe)[0] in ("read decoder", "build decode")
    assert stages_of(copied, recipe) == [NOTHING_CHANGED]


# ---------------------------------------------------------------- bad input


def test_a_bad_folder_is_found_before_anything_is_made(
    checkpoints: dict[int, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no decoder at"):
        compile_bundle(recipe_of(checkpoints[4], tmp_path / "nowhere"), "cpu", out=out)
    assert not out.exists()
    with pytest.raises(RecipeError, match="latents of 16 channels, the model makes 4"):
        compile_bundle(recipe_of(checkpoints[4], folders["kl16"]), "cpu", out=out)
    assert [path.name for path in out.iterdir()] in ([], [".build.lock"])


def test_a_failed_decoder_leaves_the_old_bundle(
    copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["kl4"], tmp_path / "kl4"))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    before = Bundle.open(copied).manifest
    with pytest.raises(CheckpointError, match="diffusers cannot read it"):
        compile_bundle(recipe_of(checkpoints[4], folder), "cpu", out=copied)
    assert Bundle.open(copied).manifest == before
    Pipeline.load(copied).close()


def test_the_command_line_says_it_plainly(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    lines = [
        f'name = "vae"\ncheckpoint = "{checkpoints[4]}"',
        "rows = { min = 1, opt = 2, max = 8 }",
        '[decoder]\nfolder = "nowhere"',
        '[targets.cpu]\nbackend = "onnxruntime"\ndevice = "cpu"\nprecision = "fp32"',
    ]
    (tmp_path / "vae.toml").write_text("\n".join(lines))
    done = elit("build", tmp_path / "vae.toml", "--out", tmp_path / "bundle")
    assert done.exit_code == 2
    assert f"no decoder at {tmp_path / 'nowhere'}; give a folder that diffusers saved" in " ".join(done.output.split())


# ---------------------------------------------------------------- other targets


def test_a_decoder_that_was_never_run_needs_verify(kl4: Bundle) -> None:
    plan_set = kl4.manifest.plan_sets[0]
    known = {facts.name: facts.parity for facts in plan_set.profiles}
    unknown = plan_set.with_parity(known, Parity(status="not run", reason="no GPU here"))
    with pytest.raises(BundleError, match=r"the decoder of target cpu was never compared.*no GPU here.*verify"):
        check_verified(unknown, kl4.folder)
    check_verified(plan_set, kl4.folder)


def test_bf16_leaves_the_decoder_in_fp32(copied: Path, checkpoints: dict[int, Path], folders: dict[str, Path]) -> None:
    ov = pytest.importorskip("openvino")
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    values = recipe_values(checkpoints[4])
    values["targets"] = {"bf16": {"backend": "openvino", "precision": "bf16", "threads": 1}}
    values["decoder"] = {"folder": str(folders["kl4"]), "rows": ROWS}
    bundle = compile_bundle(recipe_from_values(values, "test"), "bf16", out=copied)
    facts = facts_of(bundle, "bf16")
    assert (facts.parity.sqnr_db or 0) >= 115
    assert facts.plan.built_on["arithmetic"] == "f32"


@pytest.mark.parametrize("name", MAKERS)
def test_tensorrt_for_rtx_builds_a_plan(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    """A real plan; nothing here runs it."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings.runtime")
    folder = read_decoder(folders[name])
    spec = folder.spec(8)
    graph = GraphFile(export_decoder(load_decoder(folder), spec, tmp_path / "graph"), spec.graph)
    target = TensorRTTarget(backend="tensorrt-rtx", precision=Precision.BF16, compute_capabilities=("8.9",))
    (tmp_path / "plan").mkdir()
    profile = Profile("decode", Range(1, 1, 1), Range(1, 2, 4))
    plan = (
        BACKENDS["tensorrt-rtx"].builder().build_plan(graph, tmp_path / "plan", [profile], target, None, lambda _: None)
    )
    assert plan.file == "decode.plan"
    assert (tmp_path / "plan" / plan.file).stat().st_size > 1000


@pytest.mark.parametrize("name", ["kl16", "tiny4", "qwen8"])
def test_torch_tensorrt_gets_a_program(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    """What that backend would read, run by torch; the backend itself cannot be imported without a GPU."""
    folder = read_decoder(folders[name])
    decoder = load_decoder(folder)
    path = export_decoder_program(decoder, folder.spec(8), 4, tmp_path)
    program = torch.export.load(path).module()
    for rows in (1, 4):
        z = torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, folder.vae.channels, 8, 8), np.float32))
        with torch.inference_mode():
            assert max_relative(program(z).numpy(), decoder(z).numpy()) <= 1e-5
