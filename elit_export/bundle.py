"""What lies on disk between building and running: a folder with a manifest, written last.

Takes: files made by a build.  Gives: verified paths.  May touch: the bundle folder.
Knows nothing of: how plans are made or run.

    manifest.json            what is here, with hashes; a folder without it is no bundle
    graphs/NAME-HASH/        ONNX and weights; a copy for running may leave them out
    plans/NAME-HASH/         what engines open
    reference/NAME-HASH/     inputs and PyTorch outputs

Artifacts are folders named by their content and never change once they have their name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import ValidationError

from elit_export.errors import BundleError, InputError
from elit_export.files import flush_to_disk, sha256_of, write_text
from elit_export.manifest import KINDS, SCHEMA, Artifact, FileFacts, Manifest

OWN_HASH = "sha256"
MANIFEST = "manifest.json"
LOCK = ".build.lock"
STAGING = ".staging"
TEMPORARY_MANIFEST = re.compile(r"\.manifest\..*\.json")  # as files.written_whole names it; left behind by a kill
ARTIFACT_NAME = re.compile(r".+-[0-9a-f]{12}")
OWN_KEYS = (
    b'"schema_version"',
    b'"package_version"',
    b'"plan_sets"',
)  # two of them tell ours, damaged or not


class KeptBundleError(BundleError):
    """Written by a newer version, or not to be read here: not to be replaced as if it were damaged."""


# ---------------------------------------------------------------- reading


class Bundle:
    """An existing bundle, its manifest read and checked."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read the manifest; raises BundleError if it is missing, unreadable, damaged or of another schema."""
        folder = Path(folder)
        content = _manifest_bytes(folder)
        if content is None:
            raise BundleError(
                f"no bundle at {folder} (no {MANIFEST}); make one: elit-export build RECIPE --out {folder}"
            )
        return cls(folder, _read_manifest(folder / MANIFEST, content))

    def verified(self, artifact: Artifact) -> Path:
        """The folder of an artifact after checking every file's size and hash; raises BundleError."""
        folder = self.folder / artifact.kind / artifact.name
        for name, facts in artifact.files.items():
            try:
                _check_file(folder / name, facts, self.folder)
            except OSError as error:
                raise BundleError(_unreadable(folder / name, error, self.folder)) from error
        return folder


def _manifest_bytes(folder: Path) -> bytes | None:
    """The content of the manifest, None if there is none; raises KeptBundleError if it cannot be read."""
    try:
        return (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise KeptBundleError(_unreadable(folder / MANIFEST, error, folder)) from error


def _unreadable(path: Path, error: OSError, bundle: Path) -> str:
    return f"{path}: cannot be read: {error.strerror}; allow it (chmod -R u+rX {bundle}) or copy the bundle again"


def _read_manifest(path: Path, content: bytes) -> Manifest:
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: damaged: {error}; {_rebuild(path.parent)}") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise KeptBundleError(
            f"{path}: schema {version} is newer than this version reads ({SCHEMA}): pip install -U elit-export"
        )
    if version != SCHEMA:
        raise BundleError(f"{path}: schema {version!r}, this version reads {SCHEMA}; {_rebuild(path.parent)}")
    if values.pop(OWN_HASH, None) != _own_hash(values):
        raise BundleError(f"{path}: damaged: altered since the build (sha256); {_rebuild(path.parent)}")
    try:
        manifest = Manifest.model_validate(values)
        _check_text(manifest)
        return manifest
    except ValidationError as error:
        first, *others = error.errors()
        problem = f"{'.'.join(str(key) for key in first['loc'])}: {first['msg']}"
        more = f" and {len(others)} more" if others else ""
        raise BundleError(f"{path}: damaged: {problem}{more}; {_rebuild(path.parent)}") from error
    except (InputError, TypeError) as error:
        raise BundleError(f"{path}: damaged: {error}; {_rebuild(path.parent)}") from error


def _check_text(manifest: Manifest) -> None:
    """Raise InputError if a profile does not say how much text its engine takes, or says it of a model without."""
    takes = bool(manifest.model.spec.text_width)
    for plan_set in manifest.plan_sets:
        for facts in plan_set.profiles:
            if (facts.text is not None) != takes:
                what = "has no range of text, which the model takes" if takes else "has text, which the model does not"
                raise InputError(f"profile {facts.name} of target {plan_set.target} {what}")


def manifest_text(values: dict[str, Any]) -> str:
    """The manifest as it is stored: with a hash over all the rest."""
    return json.dumps({**values, OWN_HASH: _own_hash(values)}, indent=1) + "\n"


def _own_hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _rebuild(folder: Path) -> str:
    return f"build it again: elit-export build RECIPE --out {folder}"


def _check_file(path: Path, facts: FileFacts, bundle: Path) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing; copy the bundle again or {_rebuild(bundle)}")
    status = path.stat()
    if status.st_size != facts.size_bytes:
        raise BundleError(
            f"{path}: has {status.st_size} bytes, {facts.size_bytes} were written; "
            f"copy the bundle again or {_rebuild(bundle)}"
        )
    if _cached_sha256(path, status.st_size, status.st_mtime_ns) != facts.sha256:
        raise BundleError(f"{path}: altered since the build (sha256); copy the bundle again or {_rebuild(bundle)}")


@functools.lru_cache(maxsize=256)
def _cached_sha256(path: Path, _size_bytes: int, _mtime_ns: int) -> str:
    return sha256_of(path)


# ---------------------------------------------------------------- writing


class BundleWriter:
    """A bundle being built: stages artifacts, then makes them real by replacing the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        return Bundle(self.folder, manifest)

    def existing(self) -> Manifest | None:
        """The manifest of an earlier build, None if there is none or it is damaged or old; raises KeptBundleError."""
        try:
            return Bundle.open(self.folder).manifest
        except KeptBundleError:
            raise
        except BundleError:
            return None

    def clean(self) -> None:
        """Drop staging folders, half-written manifests and artifacts that no manifest names, and nothing else.

        Beside a manifest that cannot be read, every artifact stays: which ones it names is not known.
        """
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)
        for path in self.folder.iterdir():
            if TEMPORARY_MANIFEST.fullmatch(path.name):
                path.unlink(missing_ok=True)
        manifest = self.existing()
        if manifest or _manifest_bytes(self.folder) is None:
            self._drop_unnamed(manifest.artifacts() if manifest else ())

    def _drop_unnamed(self, artifacts: Iterable[Artifact]) -> None:
        named = {(artifact.kind, artifact.name) for artifact in artifacts}
        for kind in KINDS:
            for path in (self.folder / kind).glob("*"):
                if path.is_dir() and ARTIFACT_NAME.fullmatch(path.name) and (kind, path.name) not in named:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[BundleWriter]:
    """Lock a folder for one build, and leave in it what its manifest names, whatever happens.

    Raises BundleError if another build holds it, if it holds other things, or cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        _check_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise BundleError(f"another build is writing into {folder}; wait for it or choose another --out") from error
    except OSError as error:
        raise BundleError(f"cannot write into {folder}: {error.strerror}; choose another --out") from error
    writer = BundleWriter(folder)
    try:
        writer.existing()  # a newer bundle is refused before anything is built
        yield writer
        writer.clean()
    except KeptBundleError:
        raise
    except BaseException:
        writer.clean()
        raise
    finally:
        lock.release()


def _check_ours(folder: Path) -> None:
    """Building into a folder of other things would mix with them, or write over another program's manifest."""
    if not folder.is_dir():
        return
    content = _manifest_bytes(folder)
    if content is not None and sum(key in content for key in OWN_KEYS) >= 2:
        return
    names = {path.name for path in folder.iterdir() if not TEMPORARY_MANIFEST.fullmatch(path.name)}
    foreign = sorted(names - {*KINDS, LOCK, STAGING})
    # No program writes what is no JSON: beside our own folders alone it is what is left of our manifest.
    if content is not None and names > {MANIFEST} and not _is_json(content):
        foreign.remove(MANIFEST)
    if foreign:
        raise BundleError(f"{folder} is no bundle and holds other things ({foreign[0]}); choose another --out")


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _facts_of(path: Path) -> FileFacts:
    flush_to_disk(path)
    return FileFacts(sha256=sha256_of(path), size_bytes=path.stat().st_size)


def _content_hash(found: Mapping[str, FileFacts]) -> str:
    listing = "".join(f"{name}:{facts.sha256};" for name, facts in sorted(found.items()))
    return hashlib.sha256(listing.encode()).hexdigest()[:12]


def _is_whole(folder: Path, facts: Mapping[str, FileFacts]) -> bool:
    return folder.is_dir() and all(
        (folder / name).is_file() and _facts_of(folder / name) == known for name, known in facts.items()
    )
