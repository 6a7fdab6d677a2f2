"""An existing bundle: its manifest read and checked, its files verified before anything opens them."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from elit_export.bundle.artifacts import KINDS, STAGING, Artifact, FileFacts
from elit_export.bundle.atomic import sha256_of
from elit_export.bundle.manifest import SCHEMA, Manifest
from elit_export.bundle.migrate import STEPS, migrated
from elit_export.bundle.readers import CONFIG_BYTES, parsed_json, read_bytes
from elit_export.errors import BundleError, ElitExportError, InputError

log = logging.getLogger(__name__)
OWN_HASH = "sha256"
MANIFEST = "manifest.json"
REOPENINGS = 100  # more commits than this during one load are not met
SETTLED_NS = 2_000_000_000  # clocks of file systems tick slower than a file can change twice
T = TypeVar("T")


class KeptBundleError(BundleError):
    """Written by a newer version, or not to be read here: not to be replaced as if it were damaged."""


class Bundle:
    """An existing bundle, its manifest read and checked.

    `trust` opens saved programs that this user did not build here (`bundle.trust`). `content` is that of the manifest's
    file, as it was read.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, trust: bool = False, content: bytes | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.trust = trust
        self._content = content

    @classmethod
    def open(cls, folder: str | Path, *, trust: bool = False) -> Self:
        """Read the manifest; raises BundleError if it is missing, unreadable, damaged or of another schema.

        Files of a bundle may be links, into a content store such as the cache of Hugging Face; its folders may not.
        """
        folder = Path(folder)
        content = manifest_bytes(folder)
        if content is None:
            raise BundleError(
                f"no bundle at {folder} (no {MANIFEST})", f"make one: elit-export build RECIPE --out {folder}"
            )
        manifest = read_manifest(folder / MANIFEST, content)
        refuse_linked_folders(folder, manifest.artifacts())
        log.info(
            "bundle %s: model %s, plan sets %s",
            folder,
            manifest.model.name,
            ", ".join(plan_set.name for plan_set in manifest.plan_sets),
        )
        return cls(folder, manifest, trust=trust, content=content)

    def verified(self, artifact: Artifact) -> Path:
        """The folder of an artifact after checking every file's size and hash; raises BundleError."""
        try:
            return verified_folder(self.folder, artifact)
        except BundleError as error:
            if self.is_replaced:
                raise BundleError(
                    f"{self.folder} was built again meanwhile", "load it again, or run it again"
                ) from error
            raise

    @property
    def is_replaced(self) -> bool:
        """Did another process write the manifest since it was read? Then what only this one names may be gone."""
        return self._content is not None and manifest_bytes(self.folder) != self._content


def with_current(folder: str | Path, work: Callable[[Bundle], T], *, trust: bool = False) -> T:
    """What `work` makes of a bundle; it is asked again where it fails while another process replaces the manifest.

    A build drops what its manifest no longer names as soon as that is written.
    """
    for _ in range(REOPENINGS):
        bundle = Bundle.open(folder, trust=trust)
        try:
            return work(bundle)
        except (ElitExportError, OSError):
            if not bundle.is_replaced:
                raise
    raise BundleError(f"{folder} is written again and again", "wait until nothing builds into it")


def refuse_linked_folders(bundle: Path, artifacts: Iterable[Artifact] = ()) -> None:
    """Raise KeptBundleError for a folder that is a link: others may keep their files where it leads."""
    names = dict.fromkeys(f"{artifact.kind}/{artifact.name}" for artifact in artifacts)
    for name in (*KINDS, STAGING, *names):
        if (bundle / name).is_symlink():
            raise KeptBundleError(
                f"{bundle / name}: a linked folder; only files of a bundle may be links",
                "copy the folder itself to that place, or move the whole bundle to the other disk and link that",
            )


def verified_folder(bundle: Path, artifact: Artifact) -> Path:
    """Check and return the folder of an artifact as `Bundle.verified` does."""
    refuse_linked_folders(bundle, [artifact])
    folder = bundle / artifact.kind / artifact.name
    for name, facts in artifact.files.items():
        try:
            _check_file(folder / name, facts, bundle)
        except OSError as error:
            raise BundleError(_unreadable(folder / name, error, bundle)) from error
    log.info("%s: sha256 of every file as it was built: %s", folder, ", ".join(artifact.files))
    return folder


def manifest_bytes(folder: Path) -> bytes | None:
    """The content of the manifest, None if there is none; raises KeptBundleError if it cannot be read."""
    try:
        return read_bytes(folder / MANIFEST, what="the manifest", error=KeptBundleError, limit_bytes=CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise KeptBundleError(_unreadable(folder / MANIFEST, error, folder)) from error


def _unreadable(path: Path, error: OSError, bundle: Path) -> str:
    return f"{path}: cannot be read: {error.strerror}; allow it (chmod -R u+rX {bundle}) or copy the bundle again"


def read_manifest(path: Path, content: bytes) -> Manifest:
    try:
        values = parsed_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise BundleError(f"{path}: damaged: {error}", _rebuild(path.parent)) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise KeptBundleError(
            f"{path}: schema {version} is newer than this version reads ({SCHEMA})", "pip install -U elit-export"
        )
    if not isinstance(version, int) or version not in (*STEPS, SCHEMA):
        raise BundleError(f"{path}: schema {version!r}, this version reads {SCHEMA}", _rebuild(path.parent))
    if values.pop(OWN_HASH, None) != _own_hash(values):
        raise BundleError(f"{path}: damaged: altered since the build (sha256)", _rebuild(path.parent))
    try:
        manifest = Manifest.model_validate(migrated(values, version))
        _check_text(manifest)
        return manifest
    except ValidationError as error:
        first, *others = error.errors()
        problem = f"{'.'.join(str(key) for key in first['loc'])}: {first['msg']}"
        more = f" and {len(others)} more" if others else ""
        raise BundleError(f"{path}: damaged: {problem}{more}", _rebuild(path.parent)) from error
    except (InputError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise BundleError(f"{path}: damaged: {error}", _rebuild(path.parent)) from error


def _check_text(manifest: Manifest) -> None:
    """Raise InputError if a profile does not say how much text its engine takes, or says it of a model without."""
    takes = manifest.model.spec.takes_text
    for plan_set in manifest.plan_sets:
        for facts in plan_set.profiles:
            if (facts.profile.text is not None) != takes:
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
        raise BundleError(f"{path}: missing", f"copy the bundle again or {_rebuild(bundle)}")
    status = path.stat()
    if status.st_size != facts.size_bytes:
        raise BundleError(
            f"{path}: has {status.st_size} bytes, {facts.size_bytes} were written",
            f"copy the bundle again or {_rebuild(bundle)}",
        )
    if _sha256_of(path, status) != facts.sha256:
        raise BundleError(f"{path}: altered since the build (sha256)", f"copy the bundle again or {_rebuild(bundle)}")


def _sha256_of(path: Path, status: os.stat_result) -> str:
    """From memory where nothing can have changed: mtime can be set back, ctime and inode cannot."""
    if time.time_ns() - status.st_ctime_ns < SETTLED_NS:
        return sha256_of(path)
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _remembered_sha256(path, version)


@functools.lru_cache(maxsize=256)
def _remembered_sha256(path: Path, _version: tuple[int, ...]) -> str:
    return sha256_of(path)
