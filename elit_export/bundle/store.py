"""What a build writes into: artifacts named by content, under a lock, the manifest last.

    manifest.json            what is here, with hashes; a folder without it is not a bundle
    graphs/NAME-HASH/        ONNX and weights; a copy for running may leave them out
    plans/NAME-HASH/         what engines open
    reference/NAME-HASH/     inputs and PyTorch outputs

Artifacts are folders named by their content and never change once they have their name.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from elit_export.bundle.artifacts import KINDS, STAGING, Artifact, FileFacts
from elit_export.bundle.atomic import MARK, append_text, fsync, naming_file, sha256_of, write_text
from elit_export.bundle.manifest import DecoderAnswers, Graph, Manifest, Plan, Reference
from elit_export.bundle.readers import CONFIG_BYTES, read_bytes
from elit_export.bundle.reading import (
    MANIFEST,
    Bundle,
    KeptBundleError,
    manifest_bytes,
    manifest_text,
    read_manifest,
    refuse_linked_folders,
    verified_folder,
)
from elit_export.bundle.trust import remember
from elit_export.callbacks import noop
from elit_export.errors import BundleError

Progress = Callable[[str, float], None]
R = TypeVar("R", Graph, Plan, Reference, DecoderAnswers)
LOCK = ".build.lock"
WRITTEN = "written"  # in STAGING: a line for each artifact that no manifest names yet, or any more
TEMPORARY_MANIFEST = re.compile(rf"\.manifest\.{MARK}[a-z0-9_]{{8}}\.json")  # of bundle.atomic, left behind by a kill
ARTIFACT_NAME = r"\w[\w.-]*-[0-9a-f]{12}"
WRITTEN_LINE = re.compile(rf"(?:{'|'.join(KINDS)})/{ARTIFACT_NAME}\n", re.ASCII)
NAMED = re.compile(rf'"name": "({ARTIFACT_NAME})"', re.ASCII)  # in a manifest
# Two of them tell ours, damaged or not.
OWN_KEYS = (b'"schema_version"', b'"package_version"', b'"plan_sets"')


@dataclass(frozen=True)
class Made:
    """What was written into a staged folder: the fields of its record beside artifact and key, and a longer name."""

    fields: Mapping[str, Any]
    name: str = ""


@dataclass(frozen=True)
class Stage:
    """What a build is doing, in words, and the share of it that is done before."""

    what: str
    share: float


class Store:
    """A bundle being built: finds what earlier builds made, stages artifacts, and makes all real by the manifest.

    `manifest` is that of the last commit, None if there is none that can be read; `named` are the artifacts that it
    names, as KIND/NAME. `progress` hears each stage that does something and the share of the build that is done before
    it. Only what this bundle wrote is ever deleted: artifacts that a commit superseded or that never saw one, of builds
    that were killed too.
    """

    def __init__(
        self, folder: Path, manifest: Manifest | None, named: Collection[str], *, progress: Progress = noop
    ) -> None:
        self.folder, self.manifest, self.progress = folder, manifest, progress
        self._named, self._written = set(named), _written_before(folder)

    def artifact(
        self,
        record: type[R],
        name: str,
        key: str,
        make: Callable[[Path], Made],
        *,
        stage: Stage,
        first: Callable[[], object] = lambda: None,
        beside: Path | None = None,
        is_program: bool = False,
    ) -> R:
        """The record of what `make` writes into an empty folder, or an earlier one of this key that is still whole.

        `first` is called before the stage is reported: what it loads, several stages share. The folder lies in
        `beside`, where plans of a target share files while they are built. Of a program, the user's list of trusted
        files gets the hashes.
        """
        if earlier := self.known(record, key):
            return earlier
        first()
        self.progress(stage.what, stage.share)
        with _subfolder(beside, key) if beside else self.staged() as folder:
            made = make(folder)
            artifact = self.adopt(folder, record.KIND, made.name or name)
        if is_program:
            remember(artifact)
        return record(artifact=artifact, key=key, **made.fields)

    def known(self, record: type[R], key: str) -> R | None:
        """What an earlier build made under this key, if its files are whole."""
        for earlier in self.manifest.records() if self.manifest else ():
            if isinstance(earlier, record) and earlier.key == key and self._is_whole(earlier.artifact):
                return earlier
        return None

    def _is_whole(self, artifact: Artifact) -> bool:
        try:
            verified_folder(self.folder, artifact)
        except BundleError:
            return False
        return True

    def path(self, record: Graph | Plan) -> Path:
        """The file of something that was made or found."""
        return self.folder / record.artifact.kind / record.artifact.name / record.file

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder on the bundle's disk; what is not adopted is gone afterwards."""
        staging = self.folder / STAGING
        staging.mkdir(exist_ok=True)
        with naming_file(self.folder), tempfile.TemporaryDirectory(dir=staging) as private:
            folder = Path(private) / "artifact"  # with ordinary permissions, unlike its parent
            folder.mkdir()
            yield folder

    def adopt(self, staged: Path, kind: str, prefix: str) -> Artifact:
        """Hash a staged folder and move it to its content name; the same content is kept once."""
        found = {path.name: _facts_of(path) for path in sorted(staged.iterdir())}
        artifact = Artifact(kind=kind, name=f"{prefix}-{_content_hash(found)}", files=found)
        final = self.folder / kind / artifact.name
        refuse_linked_folders(self.folder, [artifact])
        final.parent.mkdir(exist_ok=True)
        if not _is_whole(final, found):
            self._note([f"{kind}/{artifact.name}"])
            shutil.rmtree(final, ignore_errors=True)
            staged.rename(final)
        return artifact

    def _note(self, names: Collection[str]) -> None:
        """Remember, beyond a kill, what is to go unless a manifest names it."""
        self._written.update(names)
        (self.folder / STAGING).mkdir(exist_ok=True)
        append_text(self.folder / STAGING / WRITTEN, "".join(f"{name}\n" for name in names), through_link=False)

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest, the moment from which the bundle exists.

        A manifest that is a link, into a content store, is replaced by a file.
        """
        self._note(self._named)
        write_text(self.folder / MANIFEST, manifest_text(manifest.model_dump(mode="json")), through_link=False)
        self.manifest, self._named = manifest, _named_by(manifest)
        return Bundle(self.folder, manifest)

    def clean(self) -> None:
        """Drop staging folders, half-written manifests and what this bundle wrote and its manifest does not name."""
        for path in self.folder.iterdir():
            if TEMPORARY_MANIFEST.fullmatch(path.name):
                path.unlink(missing_ok=True)
        for name in self._written - self._named:
            _remove_folder(self.folder / name)
        _remove_folder(self.folder / STAGING)  # last: it says what else is to go


def _remove_folder(path: Path) -> None:
    """Remove a folder with what is in it, if neither it nor the folder that it lies in is a link."""
    if not path.is_symlink() and not path.parent.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def _written_before(folder: Path) -> set[str]:
    """What a build that was killed had noted; half a line was noted before anything was done."""
    try:
        what, path = "a list of artifacts", folder / STAGING / WRITTEN
        content = read_bytes(path, what=what, error=KeptBundleError, limit_bytes=CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    lines = content.decode("utf-8", errors="replace").splitlines(keepends=True)
    return {line.rstrip("\n") for line in lines if WRITTEN_LINE.fullmatch(line)}


def _named_by(manifest: Manifest) -> set[str]:
    return {f"{artifact.kind}/{artifact.name}" for artifact in manifest.artifacts()}


def _named_in(content: bytes) -> set[str]:
    """The same of a manifest that cannot be read, as far as its text tells."""
    names = NAMED.findall(content.decode("utf-8", errors="replace"))
    return {f"{kind}/{name}" for kind in KINDS for name in names}


@contextmanager
def _subfolder(parent: Path, key: str) -> Iterator[Path]:
    """An empty folder; it goes with its parent."""
    folder = parent / key
    folder.mkdir()
    yield folder


@contextmanager
def writing(folder: Path, progress: Progress = noop) -> Iterator[Store]:
    """Lock a folder for one build, and leave in it what its manifest names, whatever happens.

    Raises BundleError if another build holds it, if it holds other things, or cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        is_new_lock = not (folder / LOCK).exists()
        folder.mkdir(parents=True, exist_ok=True)
        refuse_linked_folders(folder)
        for own in (folder / LOCK, folder / STAGING / WRITTEN):  # the one would be emptied, the other written into
            if own.is_symlink():
                raise BundleError(f"{own}: a link", "remove it (rm) and build again")
        lock.acquire()
    except Timeout as error:
        raise BundleError(f"another build is writing into {folder}", "wait for it or choose another --out") from error
    except OSError as error:
        raise BundleError(f"cannot write into {folder}: {error.strerror}", "choose another --out") from error
    try:
        store = _opened(folder, progress)  # a newer bundle is refused before anything is built
    except BaseException:
        lock.release()
        if is_new_lock:
            (folder / LOCK).unlink(missing_ok=True)
        raise
    try:
        yield store
    finally:
        store.clean()
        lock.release()


def check_recordable(folder: Path) -> None:
    """Raise the BundleError that writing into a bundle would now, before the work whose result it is to hold."""
    with writing(folder):
        try:
            tempfile.TemporaryDirectory(dir=folder, prefix=f".{MARK}").cleanup()
        except OSError as error:
            raise BundleError(
                f"cannot write into {folder}: {error.strerror}", "let it be written, or take a copy of the bundle"
            ) from error


def _opened(folder: Path, progress: Progress) -> Store:
    """Raises KeptBundleError for a manifest that is not to be replaced, BundleError for a folder of other things."""
    content = manifest_bytes(folder)
    _check_ours(folder, content)
    if content is None:
        return Store(folder, None, (), progress=progress)
    try:
        manifest = read_manifest(folder / MANIFEST, content)
    except KeptBundleError:
        raise
    except BundleError:  # damaged or old: built again
        return Store(folder, None, _named_in(content), progress=progress)
    refuse_linked_folders(folder, manifest.artifacts())
    return Store(folder, manifest, _named_by(manifest), progress=progress)


def _check_ours(folder: Path, content: bytes | None) -> None:
    """Building into a folder of other things would mix with them, or write over another program's manifest."""
    if content is not None and sum(key in content for key in OWN_KEYS) >= 2:
        return
    names = {path.name for path in folder.iterdir() if not TEMPORARY_MANIFEST.fullmatch(path.name)}
    foreign = sorted(names - {*KINDS, LOCK, STAGING})
    # No program writes what is not JSON: beside our own folders alone it is what is left of our manifest.
    if content is not None and names > {MANIFEST, LOCK} and not _is_json(content):
        foreign.remove(MANIFEST)
    if foreign:
        raise BundleError(f"{folder} is not a bundle and holds other things ({foreign[0]})", "choose another --out")


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _facts_of(path: Path) -> FileFacts:
    fsync(path)
    return FileFacts(sha256=sha256_of(path), size_bytes=path.stat().st_size)


def _content_hash(found: Mapping[str, FileFacts]) -> str:
    listing = "".join(f"{name}:{facts.sha256};" for name, facts in sorted(found.items()))
    return hashlib.sha256(listing.encode()).hexdigest()[:12]


def _is_whole(folder: Path, facts: Mapping[str, FileFacts]) -> bool:
    return folder.is_dir() and all(
        (folder / name).is_file() and _facts_of(folder / name) == known for name, known in facts.items()
    )
