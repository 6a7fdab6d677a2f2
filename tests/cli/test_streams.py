"""Commands whose output is a pipe, a device or a descriptor, or cannot be written: in processes of their own."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from elit_export.bundle.reading import Bundle
from elit_export.cli import main
from elit_export.cli.streams import READER_LEFT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and descriptors")
PROGRAM = [sys.executable, "-m", "elit_export"]


def words_of(command: str, bundle: Bundle, out: Path) -> list[str]:
    return [word.replace("BUNDLE", str(bundle.folder)).replace("OUT", str(out)) for word in command.split()]


def with_no_reader(words: list[str], *, both: bool = False) -> tuple[int, str]:
    """Exit status and standard error of a command whose output nobody reads, as after `| head -0`; `both` as `2>&1`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*PROGRAM, *words], stdout=writer, stderr=writer if both else subprocess.PIPE, check=False, timeout=120
        )
    finally:
        os.close(writer)
    return done.returncode, (done.stderr or b"").decode()


# ---------------------------------------------------------------- readers that leave


@pytest.mark.parametrize(
    "command",
    ["--help", "inspect --help", "inspect BUNDLE", "inspect BUNDLE --json -", "inspect BUNDLE --json /dev/stdout"],
)
def test_broken_pipes_have_one_status_whatever_the_command(tiny_bundle: Bundle, tmp_path: Path, command: str) -> None:
    """Neither the 1 of a check that failed, nor the 2 of an error, nor the 120 of a flush at exit."""
    status, said = with_no_reader(words_of(command, tiny_bundle, tmp_path))
    assert (status, "Traceback" in said) == (READER_LEFT, False), said


@pytest.mark.parametrize("both", [False, True], ids=["| head", "2>&1 | head"])
def test_a_sampling_whose_reader_leaves_still_writes_its_pictures(
    tiny_bundle: Bundle, tmp_path: Path, both: bool
) -> None:
    words = words_of("sample BUNDLE --steps 2 --labels 0-2 --out OUT/s.png", tiny_bundle, tmp_path)
    status, said = with_no_reader(words, both=both)
    assert status == READER_LEFT, said
    with Image.open(tmp_path / "s.png") as picture:
        picture.load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz", "s.png"]


def test_an_error_keeps_its_status_though_nobody_reads(tmp_path: Path) -> None:
    assert with_no_reader(["inspect", str(tmp_path)], both=True)[0] == 2


def closed(words: list[str], redirection: str) -> tuple[int, str]:
    """Exit status and standard error of a command whose outputs a shell sends somewhere."""
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *PROGRAM, *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False, timeout=120)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("command", ["--help", "inspect BUNDLE", "sample BUNDLE --steps 1 --labels 0 --out OUT/s.png"])
@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-"])
def test_outputs_that_are_closed_are_silent(
    tiny_bundle: Bundle, tmp_path: Path, command: str, redirection: str
) -> None:
    status, said = closed(words_of(command, tiny_bundle, tmp_path), redirection)
    assert (status, "Traceback" in said) == (0, False), said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("command", ["inspect BUNDLE", "--help"])
def test_an_output_without_space_is_named(tiny_bundle: Bundle, tmp_path: Path, command: str) -> None:
    status, said = closed(words_of(command, tiny_bundle, tmp_path), ">/dev/full")
    assert (status, said) == (2, "error: standard output: No space left on device\n")


def test_a_reader_that_stays_sees_all_and_the_status_is_0(tiny_bundle: Bundle, tmp_path: Path) -> None:
    words = words_of("inspect BUNDLE --json -", tiny_bundle, tmp_path)
    done = subprocess.run([*PROGRAM, *words], capture_output=True, check=True, timeout=120)
    assert json.loads(done.stdout)


# ---------------------------------------------------------------- outputs that are pipes or descriptors


def read_from(pipe: Path, words: list[str]) -> tuple[bytes, Result]:
    """What a command in this process writes into a pipe."""
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    result = CliRunner().invoke(main, words)
    reader.join(timeout=60)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    return read[0], result


def test_facts_go_into_a_pipe(tiny_bundle: Bundle, tmp_path: Path) -> None:
    wanted = CliRunner().invoke(main, words_of("inspect BUNDLE --json -", tiny_bundle, tmp_path)).stdout
    words = words_of("inspect BUNDLE --json OUT/pipe", tiny_bundle, tmp_path)
    content, result = read_from(tmp_path / "pipe", words)
    assert (json.loads(content), result.exit_code) == (json.loads(wanted), 0)


@pytest.mark.parametrize("has_pictures", [True, False])
def test_a_sampling_goes_into_a_pipe(
    tiny_bundle: Bundle, golden_g4_bundle: Bundle, tmp_path: Path, has_pictures: bool
) -> None:
    """The pictures alone, or the latents where no pictures can be made; what is said goes to standard error."""
    bundle = tiny_bundle if has_pictures else golden_g4_bundle
    words = words_of("sample BUNDLE --steps 1 --labels 0 --out OUT/pipe", bundle, tmp_path)
    content, result = read_from(tmp_path / "pipe", words)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert f"wrote {tmp_path / 'pipe'}" in result.stderr
    if has_pictures:
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG"
    else:
        with np.load(io.BytesIO(content)) as arrays:
            assert arrays["latents"].shape == (1, *bundle.manifest.model.spec.sample_shape)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_shell_substitutes_a_process_for_an_output(tiny_bundle: Bundle, tmp_path: Path) -> None:
    script = f'{sys.executable} -m elit_export inspect "{tiny_bundle.folder}" --json >(cat >"{tmp_path}/got"); wait $!'
    subprocess.run(["bash", "-c", script], check=True, capture_output=True, timeout=120)
    assert json.loads((tmp_path / "got").read_text())


# ---------------------------------------------------------------- outputs that cannot be written


@pytest.mark.parametrize(
    "command",
    [
        "sample BUNDLE --out OUT/file/s.png",
        "calibrate samples BUNDLE --out OUT/file/s.npz",
        "calibrate cache BUNDLE --plot OUT/file/p.png",
        "calibrate cache BUNDLE --json OUT/file/f.json",
        "bench engines BUNDLE --json OUT/file/f.json",
        "bench cache BUNDLE --plot OUT/file/p.png",
        "verify BUNDLE --json OUT/file/f.json",
        "evaluate BUNDLE --json OUT/file/f.json",
        "demo --bundle BUNDLE --out OUT/file/d",
        "embed OUT --prompt a --out OUT/file/p.npz",
        "train OUT/nothing --out OUT/file/run",
        "train-classifier OUT/nothing --out OUT/file/c.safetensors",
        "export shipped:fashion --out OUT/file/e",
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Where a file stands in the place of a folder; nothing else of the command is reached."""
    (tmp_path / "file").write_text("")

    def worked(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("elit_export.runtime.pipeline.open_bank", worked)
    monkeypatch.setattr("elit_export.verify.check.open_bank", worked)
    monkeypatch.setattr("elit_export.checkpoints.native.stored_checkpoint", worked)
    result = CliRunner().invoke(main, words_of(command, tiny_bundle, tmp_path))
    assert result.exit_code == 2, result.output
    assert f"error: {tmp_path / 'file'}/" in result.stderr
    assert "Not a directory" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_plot_in_no_known_format_is_refused_before_the_work(tiny_bundle: Bundle, tmp_path: Path) -> None:
    words = words_of("bench cache BUNDLE --plot OUT/p.doc", tiny_bundle, tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "no pictures are written as .doc; use .png, .svg or .pdf" in result.stderr
