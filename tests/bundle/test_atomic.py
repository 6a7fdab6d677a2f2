"""The one writer of files: what it does to every kind of name, and what it leaves behind."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from elit_export.bundle.atomic import atomic_write, check_writable, is_stream, private_folder, write_text

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, descriptors, modes")


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- devices, pipes, descriptors


def test_a_pipe_is_written_into_and_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe.png", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    with atomic_write(pipe) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("a")
        temporary.write_text("whole")  # what was written before counts for nothing
    reader.join()
    assert read == [b"whole"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert names(tmp_path) == ["pipe.png"]


def test_a_link_to_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_text(tmp_path / "link", "whole")
    reader.join()
    assert read == [b"whole"]
    assert (tmp_path / "link").is_symlink()


def test_a_device_is_written_into_and_stays() -> None:
    """A terminal is a device that everyone has."""
    master, slave = os.openpty()
    terminal = Path(os.ttyname(slave))
    write_text(terminal, "whole\n")
    assert os.read(master, 100).split() == [b"whole"]
    assert stat.S_ISCHR(terminal.stat().st_mode)
    os.close(master)
    os.close(slave)


def test_a_null_device_is_not_replaced_by_the_superuser(tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only the superuser makes devices, and not everywhere")
    write_text(null, "gone")
    assert stat.S_ISCHR(null.lstat().st_mode)
    assert names(tmp_path) == ["null"]


def test_nothing_goes_into_a_pipe_when_the_work_fails(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with pytest.raises(FileNotFoundError), atomic_write(Path(f"/dev/fd/{writer}")) as temporary:
        temporary.write_bytes(b"half" + Path("/absent").read_bytes())
    os.close(writer)
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_a_descriptor_of_a_file_is_written_where_it_stands(tmp_path: Path) -> None:
    """As where a shell collects the output of several commands in one file."""
    with (tmp_path / "log").open("wb", buffering=0) as file:
        file.write(b"before ")
        inode = os.fstat(file.fileno()).st_ino
        write_text(Path(f"/dev/fd/{file.fileno()}"), "mine")
        file.write(b" after")
    assert (tmp_path / "log").read_bytes() == b"before mine after"
    assert (tmp_path / "log").stat().st_ino == inode


def test_standard_output_by_its_name(tmp_path: Path) -> None:
    """Piped, and into a file that others write too."""
    code = "import pathlib, elit_export.bundle.atomic as a; a.write_text(pathlib.Path('/dev/stdout'), 'mine\\n')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"mine\n"
    with (tmp_path / "all").open("wb", buffering=0) as file:
        file.write(b"before\n")
        subprocess.run(command, stdout=file, check=True)
        file.write(b"after\n")
    assert (tmp_path / "all").read_bytes() == b"before\nmine\nafter\n"
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_error_of_a_device_names_it() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_text(Path("/dev/full"), "much")


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_followed_and_stays(tmp_path: Path, is_there: bool) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link.json"
    disk.mkdir()
    if is_there:
        (disk / "target.json").write_text("old")
    link.symlink_to("disk/target.json")
    write_text(link, "new")
    assert link.is_symlink()
    assert (disk / "target.json").read_text() == "new"
    assert names(disk) == ["target.json"]
    assert names(tmp_path) == ["disk", "link.json"]


def test_a_link_into_a_content_store_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("others read this")
    (tmp_path / "manifest.json").symlink_to("blob")
    write_text(tmp_path / "manifest.json", "new", through_link=False)
    assert (tmp_path / "blob").read_text() == "others read this"
    assert not (tmp_path / "manifest.json").is_symlink()
    assert (tmp_path / "manifest.json").read_text() == "new"


def test_links_in_a_circle_are_an_error_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(OSError, match="symbolic links") as caught:
            write(tmp_path / "a")
        assert caught.value.filename in (str(tmp_path / "a"), tmp_path / "a")


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    os.umask(umask)
    write_text(tmp_path / "new", "x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_an_old_file_keeps_its_mode_and_is_never_wider(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "old"
    path.write_text("old")
    path.chmod(mode)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert stat.S_IMODE(temporary.stat().st_mode) & ~(mode | 0o600) == 0
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser gives files away")
def test_an_old_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_text("old")
    os.chown(path, 65534, 65534)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


def refusing(number: int) -> Callable[..., NoReturn]:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_what_a_mount_refuses_does_not_cost_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o755)
    for place, name in ((os, "fsync"), (os, "chmod"), (os, "chown"), (fcntl, "flock")):
        monkeypatch.setattr(place, name, refusing(number))
    for name in ("old", "new"):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"
    assert names(tmp_path) == ["new", "old"]


def test_a_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    (tmp_path / "f").write_text("old")
    with pytest.raises(OSError, match=f"'{tmp_path / 'f'}'"):
        write_text(tmp_path / "f", "new")
    assert ((tmp_path / "f").read_text(), names(tmp_path)) == ("old", ["f"])


# ---------------------------------------------------------------- names and errors


@pytest.mark.parametrize(
    "name", ["a" * 245 + ".npz", "像" * 83 + ".npz", "a" * 255, "é" * 120 + ".x" * 7, "." + "b" * 250]
)
def test_long_names(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("whole")
        assert len(os.fsencode(temporary.name)) <= 143  # as much as encrypted folders take
        if name.endswith(".npz"):
            assert temporary.suffix == ".npz"
    assert (tmp_path / name).read_text() == "whole"
    assert names(tmp_path) == [name]


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"):
        check_writable(tmp_path / ("a" * 256))


@pytest.mark.parametrize("filename", [None, ".f.elit-0123abcd.npz"])
def test_an_error_names_the_file(tmp_path: Path, filename: str | None) -> None:
    """As of a full disk, which names nothing, or the temporary file."""
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'f.npz'}'"),
        atomic_write(tmp_path / "f.npz"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)


def test_an_error_of_another_file_names_that(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), atomic_write(tmp_path / "f.npz"):
        (tmp_path / "absent").read_bytes()


# ---------------------------------------------------------------- places, tried before the work


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("absent")
    os.mkfifo(tmp_path / "pipe")  # which nobody reads: opening it would wait
    before = names(tmp_path)
    for name in ("old", "new", "link", "pipe", "made/on/writing.npz"):
        check_writable(tmp_path / name)
    check_writable(Path("/dev/null"))
    assert names(tmp_path) == before
    assert (tmp_path / "old").read_text() == "old"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, kind in ((tmp_path, IsADirectoryError), (tmp_path / "file" / "below" / "f", NotADirectoryError)):
        with pytest.raises(kind, match=str(path)):
            check_writable(path)
    with pytest.raises(OSError, match="/dev/fd/999"):
        check_writable(Path("/dev/fd/999"))
    with (tmp_path / "file").open() as file, pytest.raises(PermissionError, match="open for reading only: '/dev/fd/"):
        check_writable(Path(f"/dev/fd/{file.fileno()}"))
    if Path("/proc/version").exists():  # where not even the superuser makes files
        with pytest.raises(OSError, match="/proc/new"):
            check_writable(Path("/proc/new"))


def test_streams_are_told_from_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("pipe")
    streams = ["/dev/null", "/dev/stdout", "/dev/fd/1", tmp_path / "pipe", tmp_path / "link"]
    assert all(is_stream(Path(path)) for path in streams)
    assert not any(is_stream(tmp_path / name) for name in ("file", "absent", "."))


# ---------------------------------------------------------------- private folders


def test_a_private_folder_that_a_kill_left_goes_with_the_next(tmp_path: Path) -> None:
    """Held ones, links and folders of others stay."""
    left, other = tmp_path / ".export.elit-0123abcd", tmp_path / ".export-plan"
    for folder in (left, other, tmp_path / "mine"):
        folder.mkdir()
        (folder / "content").write_text("x")
    (tmp_path / ".export.elit-0123abce").symlink_to("mine")
    with private_folder(tmp_path, "export") as held, private_folder(tmp_path, "export") as second:
        assert held != second
        assert held.is_dir()
        assert not left.exists()
    assert names(tmp_path) == [".export-plan", ".export.elit-0123abce", "mine"]
    assert (tmp_path / "mine" / "content").exists()


def test_a_file_that_a_link_stands_for_is_not_taken_for_abandoned(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    (tmp_path / ".f.elit-0123abcd.txt").symlink_to("mine")
    os.mkfifo(tmp_path / ".f.elit-0123abce.txt")
    write_text(tmp_path / "f.txt", "new")
    assert (tmp_path / "mine").read_text() == "x"
    assert len(names(tmp_path)) == 4
