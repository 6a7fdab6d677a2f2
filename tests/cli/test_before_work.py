"""What cannot be is refused before anything long begins: before engines are opened or graphs are exported."""

from __future__ import annotations

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


def test_8_bits_without_the_samples_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'name = "r"\ncheckpoint = "{tiny_checkpoint}"\nrows = {{ min = 1, opt = 1, max = 1 }}\n'
        '[targets.int8]\nbackend = "openvino"\nprecision = "int8"\n'
    )
    said = refused("build", recipe, "--out", tmp_path / "bundle", "--samples", tmp_path / "missing.npz")
    assert f"no calibration samples at {tmp_path / 'missing.npz'}" in said
    assert f"elit-export calibrate samples {tmp_path / 'bundle'} --out {tmp_path / 'missing.npz'}" in said
    assert not (tmp_path / "bundle").exists()
