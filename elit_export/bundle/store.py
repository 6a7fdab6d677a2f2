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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from elit_export.bundle.atomic import fsync, sha256_of, write_text
from elit_export.bundle.manifest import KINDS, Artifact, DecoderAnswers, FileFacts, Graph, Manifest, Plan, Reference
from elit_export.bundle.reading import (
    MANIFEST,
    Bundle,
    KeptBundleError,
    manifest_bytes,
    manifest_text,
    read_manifest,
    verified_folder,
)
from elit_export.bundle.trust import remember
from elit_export.callbacks import noop
from elit_export.errors import BundleError

Progress = Callable[[str, float], None]
R = TypeVar("R", Graph, Plan, Reference, DecoderAnswers)
LOCK = ".build.lock"
STAGING = ".staging"
TEMPORARY_MANIFEST = re.compile(r"\.manifest\..*\.json")  # of bundle.atomic, left behind by a kill
ARTIFACT_NAME = re.compile(r".+-[0-9a-f]{12}")
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

    `manifest` is that of the last commit, None if there is none that can be read. `progress` hears each stage that does
    something and the share of the build that is done before it.
    """

    def __init__(
        self, folder: Path, manifest: Manifest | None, *, keeps_all: bool = False, progress: Progress = noop
    ) -> None:
        self.folder, self.manifest, self.progress = folder, manifest, progress
        self._keeps_all = keeps_all  # beside a manifest that cannot be read, which artifacts it names is not known

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
        with tempfile.TemporaryDirectory(dir=staging) as private:
            folder = Path(private) / "artifact"  # with ordinary permissions, unlike its parent
            folder.mkdir()
            yield folder

    def adopt(self, staged: Path, kind: str, prefix: str) -> Artifact:
        """Hash a staged folder and move it to its content name; the same content is kept once."""
        found = {path.name: _facts_of(path) for path in sorted(staged.iterdir())}
        artifact = Artifact(kind=kind, name=f"{prefix}-{_content_hash(found)}", files=found)
        final = self.folder / kind / artifact.name
        final.parent.mkdir(exist_ok=True)
        if not _is_whole(final, found):
            shutil.rmtree(final, ignore_errors=True)
            staged.rename(final)
        return artifact

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest, the moment from which the bundle exists."""
        write_text(self.folder / MANIFEST, manifest_text(manifest.model_dump(mode="json")))
        self.manifest, self._keeps_all = manifest, False
        return Bundle(self.folder, manifest)

    def clean(self) -> None:
        """Drop staging folders, half-written manifests and artifacts that no manifest names, and nothing else."""
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)
        for path in self.folder.iterdir():
            if TEMPORARY_MANIFEST.fullmatch(path.name):
                path.unlink(missing_ok=True)
        if not self._keeps_all:
            self._drop_unnamed(self.manifest.artifacts() if self.manifest else ())

    def _drop_unnamed(self, artifacts: Iterable[Artifact]) -> None:
        named = {(artifact.kind, artifact.name) for artifact in artifacts}
        for kind in KINDS:
            for path in (self.folder / kind).glob("*"):
                if path.is_dir() and ARTIFACT_NAME.fullmatch(path.name) and (kind, path.name) not in named:
                    shutil.rmtree(path, ignore_errors=True)


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


def _opened(folder: Path, progress: Progress) -> Store:
    """Raises KeptBundleError for a manifest that is not to be replaced, BundleError for a folder of other things."""
    content = manifest_bytes(folder)
    _check_ours(folder, content)
    if content is None:
        return Store(folder, None, progress=progress)
    try:
        return Store(folder, read_manifest(folder / MANIFEST, content), progress=progress)
    except KeptBundleError:
        raise
    except BundleError:  # damaged or old: built again
        return Store(folder, None, keeps_all=True, progress=progress)


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
