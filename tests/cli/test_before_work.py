"""What cannot be is refused before anything long begins: before engines are opened or graphs are exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from elit_export.bundle.reading import Bundle
from elit_export.cli import main
from elit_export.runtime import opening


def refused(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    assert "━" not in done.output  # no bar, whatever it had counted
    return " ".join(done.output.split())


@pytest.fixture
def _no_engine_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a plan is a bug here."""
    monkeypatch.delattr(opening, "_opened")


@pytest.mark.usefixtures("_no_engine_opens")
@pytest.mark.parametrize(
    ("options", "metric", "said"),
    [
        (["engines"], "budgets.0.speedups.eager", "is not measured by this command; give --checkpoint FILE"),
        (["engines"], "budgets.0.timings.compile.median_ms", "give --checkpoint FILE"),
        (["engines", "--no-sampling"], "samplings.0.speedup", "leave --no-sampling out"),
        (["engines"], "budgets.0.spedups", "no metric 'budgets.0.spedups' in this bench; at 'spedups' there is name"),
        (["engines"], "budgets.first.flops", "at 'first' give the number of an entry, -1 is the last"),
        (["backends"], "backends.peaks.fp32", "give --checkpoint FILE, they are measured beside PyTorch"),
        (["memory"], "memory.rati", "at 'rati' there is plan_bytes"),
        (["soak"], "samplings", "at 'samplings' there is soak"),
        (["samplers"], "samplers.0.db", "at 'db' there is sampler, steps, calls, sqnr_db"),
        (["cache"], "cache.best_speedup", "at 'cache' there is cache_sweep"),
    ],
)
def test_a_limit_of_what_is_not_measured(
    options: list[str], metric: str, said: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "limits.json").write_text(f'[{{"metric": "{metric}", "min": 1}}]')
    command, *rest = options
    assert said in refused("bench", command, tiny_bundle.folder, *rest, "--check", tmp_path / "limits.json")


@pytest.mark.usefixtures("_no_engine_opens")
def test_a_sweep_of_caches_without_a_calibration(tiny_bundle: Bundle) -> None:
    said = refused("bench", "cache", tiny_bundle.folder, "--images", "1")
    assert f"elit-export calibrate cache {tiny_bundle.folder}" in said


@pytest.mark.usefixtures("_no_engine_opens")
def test_too_few_images_to_judge_and_what_no_profile_takes(fashion_bundle: Bundle) -> None:
    said = refused("evaluate", fashion_bundle.folder, "--images", "16")
    assert "16 images" in said
    assert "49" in said  # that many would do
    assert "magic" in refused("evaluate", fashion_bundle.folder, "--guidance", "magic:2")


@pytest.mark.usefixtures("_no_engine_opens")
@pytest.mark.parametrize("command", ["engines", "backends"])
def test_rows_that_no_profile_takes(command: str, tiny_bundle: Bundle) -> None:
    said = refused("bench", command, tiny_bundle.folder, "--rows", "1000")
    assert said.startswith("error: a bench of 1000 rows a call does not fit")  # no table of costs before it
    assert said.endswith("; choose other --rows")


# ---------------------------------------------------------------- before torch, whose import alone takes seconds

WITHOUT_TORCH = """
import sys
from elit_export.cli import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "onnx") if name in sys.modules])
"""


def refused_without_torch(*arguments: str | Path) -> str:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (2, "[]"), done.stdout + done.stderr
    return " ".join(done.stderr.split())


@pytest.fixture
def recipe(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(
        f'name = "r"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 1, max = 1 }}\n'
        '[targets.int8]\nbackend = "openvino"\nprecision = "int8"\n'
    )
    return path


def test_8_bits_without_the_samples_file(recipe: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.npz"
    said = refused_without_torch("build", recipe, "--out", tmp_path / "bundle", "--samples", missing)
    assert f"no calibration samples at {missing}" in said
    assert f"elit-export calibrate samples {tmp_path / 'bundle'} --out {missing}" in said
    assert not (tmp_path / "bundle").exists()


def test_a_target_that_the_recipe_has_not(recipe: Path) -> None:
    said = refused_without_torch("build", recipe, "--target", "int")
    assert said.endswith("recipe r has no target 'int'; it has int8; did you mean 'int8'?")


def test_a_target_that_is_not_a_usual_one() -> None:
    for command in ("init", "build"):
        assert refused_without_torch(command, "shipped:fashion", "--target", "h100").endswith(
            "; did you mean 'h100-tensorrt'?"
        )


def test_rows_are_refused_before_pytorch_is_there(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    for command in ("engines", "backends"):
        options = ["--rows", "1000", "--checkpoint", tiny_checkpoint]
        assert "choose other --rows" in refused_without_torch("bench", command, tiny_bundle.folder, *options)


def test_too_few_images_for_the_classifier(fashion_bundle: Bundle) -> None:
    assert "give at least 49" in refused_without_torch("evaluate", fashion_bundle.folder, "--images", "16")
