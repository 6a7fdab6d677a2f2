"""The meaning of the numbers in samples, and the input of a VAE decoder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from elit_export.errors import InputError
from elit_export.spec import limits
from elit_export.spec.graphs import GraphSpec, decoder_graph

ByChannel = float | tuple[float, ...]  # one number for all channels, or one for each


@dataclass(frozen=True)
class DataFacts:
    """The meaning of the numbers in a model's samples.

    `kind` is "pixels" (values in [low, high]) or "vae" (latents of a VAE: decoder input =
    sample / scale + shift, channel by channel). `class_names` may be empty.
    """

    kind: str
    low: float = -1.0
    high: float = 1.0
    scale: ByChannel = 1.0
    shift: ByChannel = 0.0
    vae: str = ""
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("pixels", "vae"):
            raise InputError(f"data kind {self.kind!r} is neither 'pixels' nor 'vae'")
        for name, bound in (("low", self.low), ("high", self.high)):
            if not _is_finite(bound):
                raise InputError(f"data {name} {bound!r} is not a finite number")
        if self.low >= self.high:
            raise InputError(f"data low {self.low!r} is not below high {self.high!r}")
        self._check_words()
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            if not all(map(_is_finite, _numbers(value))):
                raise InputError(f"data {name} {value!r} is not a finite number, nor one for each channel")
        if min(_numbers(self.scale), default=0.0) <= 0:
            raise InputError(
                f"data scale {self.scale!r} is not positive", "give positive numbers, by which latents are divided"
            )

    def _check_words(self) -> None:
        if not isinstance(self.vae, str):
            raise InputError(f"data vae {self.vae!r} is not text", "write it in quotes")
        if not isinstance(self.class_names, tuple) or not all(isinstance(name, str) for name in self.class_names):
            raise InputError(
                f"data class_names {self.class_names!r} are not a list of texts", "write numbers in quotes"
            )

    def of_channels(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return scale and shift of each channel; raises InputError if they have another number of channels."""
        scale, shift = (_numbers(value) for value in (self.scale, self.shift))
        for name, numbers in (("scale", scale), ("shift", shift)):
            if len(numbers) not in (1, channels):
                raise InputError(f"data {name} has {len(numbers)} numbers, samples have {channels} channels")
        return scale * (channels // len(scale)), shift * (channels // len(shift))

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what to_dict wrote, after a round trip through JSON."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in {**values}.items()
        }
        return cls(**fields)


def _numbers(value: ByChannel) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def by_channel_text(value: ByChannel) -> str:
    """Format one number if all are equal, else all of them in brackets."""
    numbers = [f"{number:g}" for number in _numbers(value)]
    return numbers[0] if len(set(numbers)) == 1 else f"[{', '.join(numbers)}]"


PIXELS = DataFacts(kind="pixels")
SD_VAE = DataFacts(kind="vae", scale=0.18215, vae="stabilityai/sd-vae-ft-ema")


@dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """The input and output of a VAE decoder: z = latents / scale + shift, channel by channel.

    A latent becomes `factor` × `factor` pixels with values in [−1, 1]. Scale and shift have one number a channel.
    """

    channels: int
    image_channels: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    factor: int

    def __post_init__(self) -> None:
        if min(self.channels, self.image_channels, self.factor) < 1:
            raise InputError(f"decoder: channels and factor must be at least 1, not {self}")
        limits.CHANNELS.check(self.channels, "decoder: channels", limits.OF_FILES)
        limits.FACTOR.check(self.factor, "decoder: factor", limits.OF_FILES)
        if not len(self.scale) == len(self.shift) == self.channels:
            raise InputError(
                f"{len(self.scale)} scales and {len(self.shift)} shifts of a decoder of {self.channels} channels"
            )
        if not all(map(_is_finite, (*self.scale, *self.shift))) or min(self.scale) <= 0:
            raise InputError("decoder: scales must be finite and positive, shifts finite")


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(VaeSpec):
    """A VaeSpec with the squares of `side` latents that its graph decodes."""

    side: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side < 1:
            raise InputError(f"decoder: side is {self.side}, must be at least 1")
        limits.TILE.check(self.side, "decoder: side", limits.OF_FILES)

    @property
    def graph(self) -> GraphSpec:
        """The inputs and outputs of the graph `decode`."""
        return decoder_graph(self)
