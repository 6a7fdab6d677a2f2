"""Recipes: the shipped one loads, and every mistake is told with its key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from elit_export.backends.onnxruntime.options import OnnxRuntimeTarget
from elit_export.backends.openvino.options import OpenVinoTarget
from elit_export.backends.tensorrt.options import TensorRTTarget
from elit_export.bundle.recipe import Recipe, load_recipe, recipe_from_values, shipped_recipe
from elit_export.errors import RecipeError
from elit_export.models.registry import named_spec
from elit_export.spec import MAX_TEXT_TOKENS, Precision, Profile, Range, default_profiles
from tests.helpers import tiny_spec

ROOT = Path(__file__).parent.parent.parent
ENGINES = ROOT / "engines"
RECIPE = """
name = "mine"
checkpoint = "weights/model.safetensors"
rows = { min = 1, opt = 4, max = 8 }

[[profiles]]
name = "all"
latents = { min = 1, opt = 2, max = 4 }

[[profiles]]
name = "few"
latents = { min = 1, opt = 1, max = 2 }
rows = { min = 1, opt = 1, max = 2 }

[targets.cpu]
backend = "onnxruntime"
device = "cpu"
precision = "fp32"
threads = 2
"""


GPU_RECIPE = (
    RECIPE
    + """
[targets.rtx]
backend = "tensorrt-rtx"
precision = "bf16"
compute_capabilities = ["8.9", "12.0"]
"""
)
OPENVINO_RECIPE = (
    RECIPE
    + """
[targets.ov]
backend = "openvino"
precision = "bf16"
"""
)


def recipe_file(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(old: str, new: str, text: str = RECIPE) -> str:
    assert old in text
    return text.replace(old, new)


def loaded(folder: Path, text: str = RECIPE) -> Recipe:
    return load_recipe(recipe_file(folder, text))


# ---------------------------------------------------------------- what is read


def test_the_shipped_recipe_loads() -> None:
    recipe = load_recipe(shipped_recipe())
    assert (recipe.name, recipe.checkpoint) == ("fashion", "shipped:fashion")
    assert recipe.target("cpu").backend == "onnxruntime"
    assert recipe.target("cpu").precision is Precision.FP32


def test_the_shipped_recipe_serves_every_budget() -> None:
    spec = tiny_spec(input_size=32, group_size=4)
    profiles = load_recipe(shipped_recipe()).profiles_for(spec)
    assert all(any(budget.kept in profile.latents for profile in profiles) for budget in spec.budgets)


def test_the_recipe_of_qwen_image_serves_every_budget_beside_its_folder() -> None:
    recipe, spec = (
        load_recipe(ENGINES / "elit-qwen-image-1024.toml"),
        named_spec("ELIT-Qwen-Image", resolution=1024),
    )
    profiles = recipe.profiles_for(spec)
    assert all(any(budget.kept in profile.latents for profile in profiles) for budget in spec.budgets)
    assert {profile.text for profile in profiles} == {Range(1, 128, MAX_TEXT_TOKENS)}
    assert recipe.checkpoint == str(ENGINES / "Qwen-Image")
    assert recipe.decoder
    assert recipe.decoder.folder == recipe.checkpoint


def test_a_recipe_is_read_whole(tmp_path: Path) -> None:
    recipe = loaded(tmp_path)
    assert recipe.rows == Range(1, 4, 8)
    target = recipe.target("cpu")
    assert (target.device, target.precision, target.threads) == ("cpu", Precision.FP32, 2)


def test_profiles_take_the_rows_of_the_recipe_unless_they_have_their_own(tmp_path: Path) -> None:
    assert loaded(tmp_path).profiles_for(tiny_spec()) == (
        Profile("all", Range(1, 2, 4), Range(1, 4, 8)),
        Profile("few", Range(1, 1, 2), Range(1, 1, 2)),
    )


def test_without_profiles_the_default_ones_are_built(tmp_path: Path) -> None:
    text = re.sub(r"\[\[profiles\]\].*?(?=\[targets)", "", RECIPE, flags=re.DOTALL)
    spec = tiny_spec()
    assert loaded(tmp_path, text).profiles_for(spec) == default_profiles(spec.latents, Range(1, 4, 8))


def test_numbers_that_a_checkpoint_does_not_tell_may_stand_in_the_recipe(tmp_path: Path) -> None:
    architecture = loaded(tmp_path, RECIPE + "[architecture]\nnum_heads = 6\n").architecture
    assert (architecture.num_heads, architecture.head_depth, architecture.tail_depth) == (6, None, None)


def test_the_only_target_needs_no_name(tmp_path: Path) -> None:
    assert loaded(tmp_path).only_target() == "cpu"


def test_of_several_targets_one_must_be_chosen(tmp_path: Path) -> None:
    second = '[targets.gpu]\nbackend = "onnxruntime"\ndevice = "cuda"\nprecision = "fp32"\n'
    with pytest.raises(RecipeError, match=r"mine has several targets, choose one: --target cpu \| gpu"):
        loaded(tmp_path, RECIPE + second).only_target()


def test_threads_are_all_cores_unless_said(tmp_path: Path) -> None:
    assert loaded(tmp_path, changed("threads = 2", "")).target("cpu").threads == 0


@pytest.mark.parametrize("path", sorted(ENGINES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.target("cpu").backend == "onnxruntime"
    for name, target in recipe.targets.items():
        kind = {"cpu": OnnxRuntimeTarget, "openvino": OpenVinoTarget}.get(name.split("-")[0], TensorRTTarget)
        assert isinstance(target, kind)
        assert name.endswith("-tensorrt") is (target.backend == "tensorrt")


def test_a_tensorrt_target_needs_little(tmp_path: Path) -> None:
    target = loaded(tmp_path, GPU_RECIPE).target("rtx")
    assert (target.backend, target.device, target.precision) == ("tensorrt-rtx", "cuda", Precision.BF16)
    assert target.options() == {
        "compute_capabilities": ["8.9", "12.0"],
        "layout": "per-profile",
        "workspace_mb": None,
        "optimization_level": None,
        "compatibility": "none",
        "timing_cache": False,
        "cuda_graphs": True,
        "detailed_inspection": False,
    }


# ---------------------------------------------------------------- paths


def test_a_relative_checkpoint_is_relative_to_the_recipe(tmp_path: Path) -> None:
    assert loaded(tmp_path).checkpoint == str(tmp_path / "weights/model.safetensors")


def test_a_relative_interface_is_relative_to_the_recipe(tmp_path: Path) -> None:
    text = RECIPE.replace("checkpoint =", 'interface = "elit/i.safetensors"\ncheckpoint =')
    assert loaded(tmp_path, text).interface == str(tmp_path / "elit/i.safetensors")
    assert loaded(tmp_path).interface is None
    with pytest.raises(RecipeError, match="interface: "):
        loaded(tmp_path, text.replace("elit/i.safetensors", ""))


DECODER = """
[decoder]
folder = "vae"
"""


def test_a_decoder_is_relative_to_the_recipe_and_has_defaults(tmp_path: Path) -> None:
    decoder = loaded(tmp_path, RECIPE + DECODER).decoder
    assert decoder
    assert decoder.folder == str(tmp_path / "vae")
    assert (decoder.tile, decoder.rows) == (64, Range(1, 1, 4))
    assert loaded(tmp_path).decoder is None


@pytest.mark.parametrize("size", [256, 512])
def test_what_the_page_on_decoders_downloads_is_what_a_shipped_recipe_reads(size: int, tmp_path: Path) -> None:
    """Typed where the repository lies, with the recipe's own lines taken in."""
    page = (ROOT / "docs" / "decoder.md").read_text()
    (told,) = re.findall(r"^hf download .*sd-vae-ft-ema --local-dir (\S+)$", page, re.M)
    recipe = (ROOT / "engines" / f"elit-sit-xl-2-{size}.toml").read_text()
    assert f"--local-dir {told})" in recipe
    path = tmp_path / "engines" / "recipe.toml"
    path.parent.mkdir()
    path.write_text(re.sub(r"^# (\[decoder\]|folder = )", r"\1", recipe, flags=re.M))
    decoder = load_recipe(path).decoder
    assert decoder
    assert Path(decoder.folder) == tmp_path / told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("tile = 6", r"decoder\.tile: .*multiple of 4"),
        ("tile = 0", r"decoder\.tile: .*greater than or equal to 4"),
        ("tile = 8.0", r"decoder\.tile: "),
        ("rows = { min = 2, opt = 1, max = 4 }", r"decoder\.rows: .*1 <= min <= opt <= max"),
        ("tille = 8", r"decoder\.tille: unknown key \(did you mean 'tile'\?\)"),
    ],
)
def test_mistakes_in_a_decoder_are_told_with_their_key(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        loaded(tmp_path, RECIPE + DECODER + line)
    with pytest.raises(RecipeError, match=r"decoder\.folder: "):
        loaded(tmp_path, RECIPE + DECODER.replace('"vae"', '""'))


def test_an_absolute_checkpoint_stays(tmp_path: Path) -> None:
    text = changed("weights/model.safetensors", "/models/model.safetensors")
    assert loaded(tmp_path, text).checkpoint == "/models/model.safetensors"


def test_a_shipped_checkpoint_is_no_path(tmp_path: Path) -> None:
    assert loaded(tmp_path, changed("weights/model.safetensors", "shipped:fashion")).checkpoint == "shipped:fashion"


def test_the_checkpoint_path_is_absolute_however_the_recipe_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path(path.name)).checkpoint == str(tmp_path / "weights/model.safetensors")


# ---------------------------------------------------------------- what is refused


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(RecipeError, match=re.escape(f"no recipe at {path}")):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"name: mine", "not TOML"), (b"name = ", "not TOML"), (b"\xff\xfe\x00", "not text in UTF-8")],
)
def test_what_is_not_toml_is_refused_with_the_file(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(f"{path}: {problem}")):
        load_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        # unknown keys
        ("checkpoint =", "chekpoint =", r"chekpoint: unknown key \(did you mean 'checkpoint'\?\)"),
        ("threads = 2", "thread = 2", r"targets\.cpu\.thread: unknown key \(did you mean 'threads'\?\)"),
        ("opt = 4", "opt = 4, optt = 4", r"rows\.optt: unknown key \(did you mean 'opt'\?\)"),
        ("threads = 2", "zzz = 2", r"targets\.cpu\.zzz: unknown key$"),
        # wrong types
        ('name = "mine"', "name = 3", "name: input should be a valid string"),
        ("threads = 2", 'threads = "2"', r"targets\.cpu\.threads: input should be a valid integer"),
        ("threads = 2", "threads = true", r"targets\.cpu\.threads: input should be a valid integer"),
        ("opt = 4", "opt = 4.5", r"rows\.opt: input should be a valid integer"),
        ("rows = { min = 1, opt = 4, max = 8 }", "rows = 8", "rows: "),
        # missing keys
        ('name = "mine"', "", "name: field required"),
        ('device = "cpu"', "", r"targets\.cpu\.device: field required"),
        ('precision = "fp32"', "", r"targets\.cpu\.precision: field required"),
        (", max = 4", "", r"profiles\.0\.latents\.max: field required"),
        # values that cannot be
        ('backend = "onnxruntime"', 'backend = "onnx"', r"targets\.cpu\.backend: unknown .*'onnx'; known: onnxruntime"),
        ('device = "cpu"', 'device = "tpu"', r"targets\.cpu: device 'tpu': backend onnxruntime has cpu, cuda"),
        ('precision = "fp32"', 'precision = "fp3"', r"targets\.cpu\.precision: input should be .*'fp32'"),
        ("threads = 2", "threads = -1", r"targets\.cpu\.threads: .*greater than or equal to 0"),
        ("opt = 4", "opt = 9", r"rows: range 1\.\.9\.\.8: needs 1 <= min <= opt <= max"),
        ("min = 1, opt = 4", "min = 0, opt = 4", r"rows: range 0\.\.4\.\.8: needs 1 <= min"),
        ("min = 1, opt = 2, max = 4", "min = 3, opt = 2, max = 4", r"profiles\.0\.latents: range 3\.\.2\.\.4"),
        ('name = "mine"', 'name = "my model"', "name: string should match pattern"),
        ('name = "mine"', 'name = "a/b"', "name: string should match pattern"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = recipe_file(tmp_path, changed(old, new))
    with pytest.raises(RecipeError, match=re.escape(f"{path}: ") + told):
        load_recipe(path)


CAPABILITIES = '["8.9", "12.0"]'


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        # unknown and missing keys
        ('precision = "bf16"', 'precision = "bf16"\ntime_cache = true', r"time_cache: unknown key \(.*'timing_cache'"),
        ('precision = "bf16"', 'precision = "bf16"\nthreads = 2', r"\.threads: unknown key$"),
        (f"compute_capabilities = {CAPABILITIES}", "", r"\.compute_capabilities: field required"),
        # GPUs that cannot be
        (
            CAPABILITIES,
            '["89"]',
            r"compute_capabilities\.0: '89' is not a compute capability; .* like '8\.9' and '12\.0'",
        ),
        (CAPABILITIES, '["8.9", "sm120"]', r"compute_capabilities\.1: 'sm120' is not a compute capability"),
        (CAPABILITIES, '["8.9\\n"]', r"compute_capabilities\.0: '8\.9\\n' is not a compute capability"),
        (CAPABILITIES, "[8.9]", r"compute_capabilities\.0: input should be a valid string"),
        (CAPABILITIES, '"8.9"', r"compute_capabilities: input should be a valid array"),
        (CAPABILITIES, '["8.9", "12.0", "8.9"]', r": compute_capabilities .* names one twice"),
        (CAPABILITIES, "[]", r"compute_capabilities: tuple should have at least 1 item"),
        # values that cannot be
        ('precision = "bf16"', 'precision = "fp4"', r"\.precision: input should be 'fp32', 'fp16', 'bf16', 'int8' or"),
        ('precision = "bf16"', 'precision = "bf16"\ndevice = "cpu"', r"device 'cpu': backend tensorrt-rtx has cuda"),
        ('precision = "bf16"', 'precision = "bf16"\nlayout = "both"', r"layout: input should be 'per-profile' or 'mul"),
        ('precision = "bf16"', 'precision = "bf16"\nworkspace_mb = 0', r"workspace_mb: .*greater than or equal to 1"),
        ('precision = "bf16"', 'precision = "bf16"\noptimization_level = 6', r"optimization_level: .*less than or eq"),
        ('precision = "bf16"', 'precision = "bf16"\ncompatibility = "gpu"', r"compatibility: input should be 'none', "),
    ],
)
def test_a_mistake_in_a_tensorrt_target_is_told_with_file_and_key(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    path = recipe_file(tmp_path, changed(old, new, GPU_RECIPE))
    with pytest.raises(RecipeError, match=re.escape(f"{path}: targets.rtx") + f".*{told}"):
        load_recipe(path)


def test_an_openvino_target_needs_little(tmp_path: Path) -> None:
    target = loaded(tmp_path, OPENVINO_RECIPE).target("ov")
    assert (target.device, target.precision, target.accept_below_tolerance) == ("cpu", Precision.BF16, None)
    assert target.options() == {"threads": 0, "hint": "latency"}


@pytest.mark.parametrize(
    ("precision", "line", "told"),
    [
        ("bf16", 'hint = "speed"', r"\.hint: input should be 'latency' or 'throughput'"),
        ("bf16", "threads = 1025", r"\.threads: .*less than or equal to 1024"),
        ("bf16", 'device = "gpu"', r"device 'gpu': backend openvino has cpu"),
        ("fp16", "", r"precision 'fp16': backend openvino has fp32, bf16, int8"),
        ("bf16", "fused = true", r"fused: backend openvino would also round .* use precision fp32"),
        ("int8", "fused = true", r"fused: only `step` is quantized to int8; leave it out"),
        ("int8", 'accept_below_tolerance = ""', r"\.accept_below_tolerance: string should match"),
        ("int8", 'accept_below_tolerance = " "', r"\.accept_below_tolerance: string should match"),
        ("int8", "accept_below_tolerance = true", r"\.accept_below_tolerance: input should be a valid string"),
    ],
)
def test_a_mistake_in_an_openvino_target_is_told_with_file_and_key(
    tmp_path: Path, precision: str, line: str, told: str
) -> None:
    path = recipe_file(tmp_path, changed('"bf16"', f'"{precision}"\n{line}', OPENVINO_RECIPE))
    with pytest.raises(RecipeError, match=re.escape(f"{path}: targets.ov") + f".*{told}"):
        load_recipe(path)


def test_a_quantized_graph_is_never_fused(tmp_path: Path) -> None:
    text = changed('precision = "bf16"', 'precision = "fp8"\nfused = true', GPU_RECIPE)
    with pytest.raises(RecipeError, match="fused: only `step` is quantized to fp8; leave it out"):
        loaded(tmp_path, text)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = changed("threads = 2", "thread = 2").replace('name = "mine"', "")
    with pytest.raises(RecipeError, match=r"name: field required; .*cpu\.thread: unknown key"):
        loaded(tmp_path, text)


@pytest.mark.parametrize("name", ["..", ".hidden"])
def test_a_name_that_would_leave_or_hide_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="name: "):
        loaded(tmp_path, changed('"mine"', f'"{name}"'))


def test_two_profiles_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"profiles.*'?all'?"):
        loaded(tmp_path, changed('name = "few"', 'name = "all"'))


def test_a_recipe_without_targets_is_refused() -> None:
    values: dict[str, Any] = {"name": "mine", "rows": {"min": 1, "opt": 1, "max": 1}, "targets": {}}
    with pytest.raises(RecipeError, match="here: targets: "):
        recipe_from_values(values, "here")


def test_an_unknown_target_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mine has no target 'gpu'; it has cpu"):
        loaded(tmp_path).target("gpu")


def test_a_profile_beyond_the_latents_of_the_model_is_refused(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, changed("opt = 1, max = 2 }\nrows", "opt = 1, max = 5 }\nrows"))
    with pytest.raises(RecipeError, match=r"profiles\.1\.latents\.max is 5, but the model has 4 latents"):
        recipe.profiles_for(tiny_spec())
