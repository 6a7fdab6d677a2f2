"""Folders of files that a build makes, named by their content, and what of them may be opened."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from elit_export.bundle.atomic import NAME_PATTERN

KINDS = ("graphs", "plans", "reference")
STAGING = ".staging"  # beside them: where a build makes what it then moves there
REFERENCE_FILE = "reference.npz"  # of PyTorch's outputs, in their artifacts

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileFacts(Facts):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Artifact(Facts):
    """A folder of files under `kind`/`name`."""

    kind: str = Field(pattern=f"^({'|'.join(KINDS)})$")
    name: Name
    files: dict[Name, FileFacts] = Field(min_length=1)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


def hashed(entry: Any) -> Any:
    """Check that what is opened of an artifact is among the files whose hashes are kept."""
    if entry.file not in entry.artifact.files:
        raise ValueError(f"{entry.file} is not among the files of {entry.artifact.name} whose hashes are kept")
    return entry
