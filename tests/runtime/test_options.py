"""Every option of a sampling is stated once: signature, help, command line and docs say the same.

    python -m tests.runtime.test_options

prints the table of docs/sampling.md.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from elit_export import Pipeline
from elit_export.cli import main
from elit_export.errors import InputError
from elit_export.runtime.arguments import SamplingArguments
from elit_export.runtime.guidance import Guidance, Kind
from elit_export.runtime.options import SamplingOptions, abouts, resolve
from tests.helpers import tiny_spec
from tests.runtime.carrying import carrying

DOCS = Path(__file__).parent.parent.parent / "docs" / "sampling.md"
ANNOTATIONS = {each.name: each.type for each in fields(SamplingArguments)}
NAMES = [each.name for each in fields(SamplingArguments)]


def table() -> str:
    lines = ["| option | default | meaning | values |", "|---|---|---|---|"]
    for name, about in abouts(SamplingArguments).items():
        default = f"`{getattr(SamplingArguments, name)!r}`" if about.is_typed else ""
        lines.append(f"| `{name}` | {default} | {about.text} | {about.values} |")
    return "\n".join(lines)


def test_the_docs_hold_the_table() -> None:
    _, _, behind = DOCS.read_text(encoding="utf-8").partition("<!-- options -->\n")
    found, _, _ = behind.partition("\n<!-- options -->")
    assert found == table()


@pytest.mark.parametrize("method", ["sample", "steps", "request"])
def test_signature_and_help_list_every_option_with_its_default(method: str) -> None:
    function = getattr(Pipeline, method)
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:2] == ["self", "labels"]
    assert [name for name in parameters if name in NAMES] == NAMES
    for name in NAMES:
        assert parameters[name].default == getattr(SamplingArguments, name)
        assert parameters[name].annotation == ANNOTATIONS[name]
        assert re.search(rf"^{name}( \(default .*\))?: ", function.__doc__, re.MULTILINE), name


def test_the_command_line_has_every_option_that_can_be_typed() -> None:
    said = CliRunner().invoke(main, ["sample", "--help"], terminal_width=200).output
    typed = {name for name, about in abouts(SamplingArguments).items() if about.is_typed}
    assert {name for name in NAMES if f"--{name.replace('_', '-')} " in said} == typed
    assert set(NAMES) - typed == {"noise", "step_noise"}


def test_an_option_that_there_is_not_is_refused() -> None:
    pipeline: Any = carrying().pipeline
    for run in (pipeline.sample, pipeline.steps, pipeline.request):
        with pytest.raises(InputError, match="unknown option 'step'; did you mean 'steps'"):
            run([0], step=3)


def test_an_option_of_a_sampling_that_only_sample_takes() -> None:
    pipeline: Any = carrying().pipeline
    heard: list[Any] = []
    pipeline.sample([0], steps=2, on_step=heard.append)
    assert [record.index for record in heard] == [0, 1]
    with pytest.raises(InputError, match="unknown option 'on_step'"):
        pipeline.steps([0], on_step=heard.append)


def test_a_value_of_guidance_has_its_interval() -> None:
    guidance = Guidance(Kind.CFG, 2.0, low=0.2)
    assert resolve(tiny_spec(), SamplingOptions(guidance=guidance)).guidance is guidance
    with pytest.raises(InputError, match="leave guidance_interval out"):
        resolve(tiny_spec(), SamplingOptions(guidance=guidance, guidance_interval=(0.1, 0.9)))


def test_a_sample_and_the_package_show_themselves() -> None:
    import elit_export

    sample = carrying().pipeline.sample([0, 1], steps=2)
    assert repr(sample) == f"<Sample: {sample.summary()}>"
    assert "\n" not in repr(sample)
    assert set(elit_export.__all__) <= set(dir(elit_export))
    assert {name for name in dir(elit_export) if not name.startswith("__")} == set(elit_export.__all__)
    assert {"Labels", "Prompts", "Sample", "StepRecord", "InputError"} <= set(dir(elit_export))


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
