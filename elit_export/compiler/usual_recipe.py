"""A recipe for a checkpoint that has none: what `init` writes, and what `build CHECKPOINT` builds by."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elit_export.backends import usual_target
from elit_export.bundle.recipe import Recipe, recipe_from_values
from elit_export.checkpoints.stored import SUFFIXES
from elit_export.cost.flops import USUAL_TEXT, flops
from elit_export.spec import (
    MAX_TEXT_TOKENS,
    DataFacts,
    ModelSpec,
    Profile,
    Range,
    by_channel_text,
    default_profiles,
    listed,
)

# One call at the full budget: XL/2 at 256 pixels gets 8 rows, models of up to 30 GFLOP MAX_ROWS.
CALL_FLOPS = 2e12
MIN_ROWS, MAX_ROWS = 4, 64
TEXT = Range(1, USUAL_TEXT, MAX_TEXT_TOKENS)
MAX_NAMES = 12  # of classes, in a comment
USUAL_TARGETS = ("cpu",)


@dataclass(frozen=True, kw_only=True)
class UsualRecipe:
    """What a recipe is made of: a checkpoint as it is named in the recipe, what it holds, and targets by their names.

    `given` are numbers of the architecture that the checkpoint itself does not tell.
    """

    name: str
    checkpoint: str
    spec: ModelSpec
    data: DataFacts
    targets: Sequence[str] = USUAL_TARGETS
    interface: str | None = None
    given: Mapping[str, int] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        """Return the recipe that load_recipe reads from the text, but with paths as they are."""
        return recipe_from_values(tomllib.loads(self.text()), f"the usual recipe of {self.checkpoint}")

    def text(self) -> str:
        """TOML with comments; raises InputError for a target that no backend has."""
        parts = (self._head(), self._sizes(), self._architecture(), self._decoder(), self._profiles(), self._targets())
        return "\n".join("".join(f"{line}\n" for line in part) for part in map(list, parts) if part)

    def _head(self) -> Iterator[str]:
        spec = self.spec
        yield f"# {spec.backbone}: {spec.tokens} tokens in {spec.groups} groups, budgets {listed(spec.budgets)}."
        yield f"# Samples of {'x'.join(map(str, spec.sample_shape))}: {_data_text(self.data)}."
        if not spec.takes_text:
            yield f"# {spec.num_classes} classes{_names_text(self.data)}."
        yield "# Paths are relative to this file."
        yield f"name = {_string(self.name)}"
        yield f"checkpoint = {_string(self.checkpoint)}"
        if self.interface:
            yield f"interface = {_string(self.interface)}  # Read and Write"

    def _sizes(self) -> Iterator[str]:
        yield "# Rows of one engine call. Classifier-free guidance on B images needs 2B rows."
        yield f"rows = {_range(usual_rows(self.spec))}"
        if self.spec.takes_text:
            yield "# Tokens of a prompt, and of a negative prompt."
            yield f"text = {_range(TEXT)}"

    def _architecture(self) -> Iterator[str]:
        """The numbers that only some checkpoints do not tell; those that were given must be told again."""
        numbers = {name: getattr(self.spec, name) for name in ("num_heads", "head_depth", "tail_depth")}
        yield "# What the shapes of a .pt file do not tell; needed only where its args do not say it either."
        yield f"{'' if self.given else '# '}[architecture]"
        for name, value in numbers.items():
            yield f"{'' if name in self.given else '# '}{name} = {value}"

    def _decoder(self) -> Iterator[str]:
        if self.data.kind == "vae":
            yield "# Makes pictures of the latents: a folder of diffusers, relative to this file."
            yield "# [decoder]"
            yield '# folder = "vae"'

    def _profiles(self) -> Iterator[str]:
        """Write the profiles that a recipe without any gets, as comments."""
        yield "# One engine for each range of K latents kept, of the J per group; these are used where none is given."
        for profile in usual_profiles(self.spec):
            yield "# [[profiles]]"
            yield f"# name = {_string(profile.name)}"
            yield f"# latents = {_range(profile.latents)}"

    def _targets(self) -> Iterator[str]:
        """Write the table of each target, which `elit-export build RECIPE --target NAME` builds."""
        for name in self.targets:
            yield f"[targets.{name}]"
            for key, value in usual_target(name).items():
                yield f"{key} = {json.dumps(value)}"
            if name != self.targets[-1]:
                yield ""


def usual_rows(spec: ModelSpec) -> Range:
    """Return the rows that CALL_FLOPS allows in one call, a power of two; plans are tuned for a quarter of them."""
    cost = flops(spec, spec.full, text=USUAL_TEXT if spec.takes_text else 0).total
    fitting = min(max(int(CALL_FLOPS / cost), MIN_ROWS), MAX_ROWS)
    most = 1 << (fitting.bit_length() - 1)
    return Range(1, most // 4, most)


def usual_profiles(spec: ModelSpec) -> tuple[Profile, ...]:
    """Return the profiles of the usual recipe."""
    text = TEXT if spec.takes_text else None
    return default_profiles(spec.latents, usual_rows(spec), step=spec.budget_step, text=text)


def usual_name(checkpoint: str) -> str:
    """The name of a file or folder, or of a shipped model, as far as it can be that of a bundle's folder."""
    path = Path(checkpoint.rpartition(":")[2]).resolve()
    stem = path.stem if path.suffix in SUFFIXES else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip(".-") or "model"


def _data_text(data: DataFacts) -> str:
    if data.kind == "pixels":
        return f"pixels in {data.low:g}..{data.high:g}"
    scale, shift = by_channel_text(data.scale), by_channel_text(data.shift)
    return f"latents of the VAE {_string(data.vae)}, decoded as x / {scale} + {shift}"


def _names_text(data: DataFacts) -> str:
    """Quoted, because names in a checkpoint may hold anything."""
    named = [_string(name) for name in data.class_names[:MAX_NAMES]]
    more = ", …" if len(data.class_names) > MAX_NAMES else ""
    return f": {', '.join(named)}{more}" if named else ""


def _string(text: str) -> str:
    """A string of TOML on one line."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _range(value: Range) -> str:
    return f"{{ min = {value.min}, opt = {value.opt}, max = {value.max} }}"
