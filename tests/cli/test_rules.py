"""Rules that every command keeps: which options it has, and in which words it refuses."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from elit_export import errors
from elit_export.bundle.reading import Bundle
from elit_export.cli import main
from elit_export.cli.common import progress_bar
from elit_export.cli.groups import Deferred
from elit_export.cli.wording import leaves, typed_text
from elit_export.errors import BundleError, InputError, did_you_mean, pip_install

SHOWS = {"show", "conclude", "finish", "measure_each"}  # what prints tables


def commands() -> Iterator[click.Command]:
    """Every command of the tree, imported."""
    for command in main.commands.values():
        assert isinstance(command, Deferred)
        yield from leaves(command.imported())


def names_used(command: click.Command) -> set[str]:
    """What a command's function calls, and the functions of its file that it calls."""
    module = sys.modules[inspect.unwrap(command.callback).__module__]  # type: ignore[arg-type]
    functions = {
        node.name: node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.FunctionDef)
    }
    seen, todo = set[str](), [inspect.unwrap(command.callback).__name__]  # type: ignore[arg-type]
    while todo:
        name = todo.pop()
        called = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        todo += [other for other in called - seen if other in functions]
        seen |= called
    return seen


def options_of(command: click.Command) -> set[str]:
    return {name for param in command.params for name in param.opts}


COMMANDS = {f"{command.callback.__module__.split('.')[-1]} {command.name}": command for command in commands()}


def test_the_tree_is_the_one_that_users_see() -> None:
    assert len(COMMANDS) >= 19
    assert {"inspect inspect", "engines engines", "calibrate cache"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_shows_a_table_writes_it_as_json_too(name: str) -> None:
    command = COMMANDS[name]
    if SHOWS & names_used(command):
        assert "--json" in options_of(command)


# It reads the graph alone, which all targets share; its --precision is what it quantizes to.
READS_NO_PLANS = {"calibrate sensitivity"}


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - READS_NO_PLANS))
def test_a_command_that_opens_a_bundle_takes_target_and_precision(name: str) -> None:
    options = options_of(COMMANDS[name])
    if "bundle" in options or "--bundle" in options or "Bundle" in names_used(COMMANDS[name]):
        assert {"--target", "--precision"} <= options


def test_the_rules_find_what_they_are_about() -> None:
    """They would hold of commands that they do not understand, too."""
    shown = {name for name, command in COMMANDS.items() if SHOWS & names_used(command)}
    assert {"build build", "train train", "demo demo", "memory soak", "verify verify", "evaluate evaluate"} <= shown
    assert {"export export", "embed embed"}.isdisjoint(shown)


# ---------------------------------------------------------------- words of the command line


@click.command()
@click.option("--target")
@click.option("--batch-size", type=int)
@click.option("--trust", is_flag=True)
def example(**_: object) -> None:
    """A command with options of each kind."""


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("no plan set for target='cpu'", "no plan set for --target cpu"),
        ("target='two words'", "--target 'two words'"),
        ("batch_size is 0, must be at least 1", "--batch-size is 0, must be at least 1"),
        ("batch_size=3 and trust=True", "--batch-size 3 and --trust"),
        ("allow_unverified=True", "allow_unverified=True"),  # not an option of this command
        ("in_channels is 3", "in_channels is 3"),
        (
            "a file batch_size.toml, /tmp/batch_size, `batch_size`",
            "a file batch_size.toml, /tmp/batch_size, `batch_size`",
        ),
        ('target = "cpu" in the recipe', 'target = "cpu" in the recipe'),
    ],
)
def test_errors_are_told_in_words_that_can_be_typed(text: str, typed: str) -> None:
    assert typed_text(InputError(text), example) == typed


def test_a_field_of_a_file_keeps_its_name() -> None:
    assert typed_text(BundleError("manifest.json: batch_size is 0"), example) == "manifest.json: batch_size is 0"


def refused(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_a_wrong_target_is_refused_with_the_one_that_is_meant(tiny_bundle: Bundle) -> None:
    for command in (["sample"], ["verify"], ["bench", "engines"], ["inspect"], ["evaluate"]):
        said = refused(*command, tiny_bundle.folder, "--target", "cp")
        assert "no plan set for --target cp; this bundle has --target cpu --precision fp32" in said
        assert "did you mean 'cpu'?" in said
    assert "for --target cpu --precision bf16;" in refused(
        "verify", tiny_bundle.folder, "--target=cpu", "--precision=bf16"
    )


def test_what_is_meant_begins_like_it_or_is_spelled_like_it() -> None:
    known = ["a100-tensorrt", "h100-tensorrt", "cpu"]
    assert did_you_mean("h100", known) == "did you mean 'h100-tensorrt'?"
    assert did_you_mean("cpi", known) == "did you mean 'cpu'?"
    assert did_you_mean("", known) == did_you_mean("rtx", known) == ""


def test_remedies_install_from_the_checkout_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(errors.CHECKOUT)
    assert pip_install("openvino") == "pip install -e '.[openvino]'"
    assert pip_install("openvino", "-U") == "pip install -U -e '.[openvino]'"
    monkeypatch.chdir(tmp_path)
    assert pip_install("openvino") == f"pip install -e '{errors.CHECKOUT}[openvino]'"
    monkeypatch.setattr(errors, "CHECKOUT", tmp_path)  # site-packages
    assert pip_install("openvino") == "pip install 'elit-export[openvino]'"


# ---------------------------------------------------------------- how much is said


def test_quiet_shows_results_alone(tiny_bundle: Bundle) -> None:
    loud, quiet = (CliRunner().invoke(main, [*options, "verify", str(tiny_bundle.folder)]) for options in ([], ["-q"]))
    assert "verifying" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout


@pytest.mark.parametrize(
    ("options", "level"), [([], logging.WARNING), (["-v"], logging.DEBUG), (["-q"], logging.ERROR)]
)
def test_verbosity_is_the_level_of_the_log(
    options: list[str], level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, own = logging.getLogger(), logging.getLogger("elit_export")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(own, "level", logging.NOTSET)
    own.manager._clear_cache()  # type: ignore[attr-defined]
    CliRunner().invoke(main, [*options, "inspect", str(tmp_path)])
    assert own.getEffectiveLevel() == level
    own.manager._clear_cache()  # type: ignore[attr-defined]


def test_verbose_tells_what_is_opened_compared_and_sampled(tiny_bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["sample", tiny_bundle.folder, "--labels", "0", "--images", "12", "--steps", "1", "--out", "s.png"]
    loud, plain = (
        subprocess.run(
            [sys.executable, "-m", "elit_export", *options, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "500"},
        )
        for options in (["-v"], [])
    )
    said, plan_set = loud.stderr, tiny_bundle.manifest.plan_sets[0]
    assert f"bundle {tiny_bundle.folder}: model test, plan sets {plan_set.name}" in said
    assert f"{plan_set.profiles[0].plan.artifact.name}: sha256 of every file as it was built: " in said
    assert f"plan set {plan_set.name}, onnxruntime on cpu: opened {plan_set.profiles[0].name}" in said
    assert "sampling images 1 to 6 of 12" in said
    assert "sampling images 7 to 12 of 12" in said
    assert "sha256" not in plain.stderr


def test_quiet_and_verbose_exclude_each_other() -> None:
    assert "-v and -q exclude each other: leave one out" in refused("-v", "-q", "doctor", "--quick")


def test_no_stale_bar_stands_above_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> None:
        with progress_bar() as progress:
            progress.add_task("measuring something", total=3)
            raise InputError("wrong", "right")

    with pytest.raises(InputError):
        measure()
    assert capsys.readouterr().err == ""  # nor an empty line, where standard error is a pipe
