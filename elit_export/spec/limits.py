"""The one table of how large numbers from users and files may be, each with its reason.

They are far above what anyone needs. What is beyond them is a slip of the hand, a damaged file or an attack, and is
refused before anything is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from elit_export.errors import InputError

SMALLER = "give a smaller number"
OF_FILES = f"{SMALLER}, or copy the file again where a file says so"
DIGITS = 20  # of a number that is read at all: text of thousands of digits is none


@dataclass(frozen=True)
class Bound:
    """The largest value of one sort of number, and why no larger one is taken; `thing` is what it counts."""

    maximum: float
    thing: str
    reason: str

    def __str__(self) -> str:
        return f"at most {self.maximum:,} {self.thing}: {self.reason}"

    def check(self, value: float, name: str, remedy: str = SMALLER) -> None:
        """Raise InputError if a value, which messages call `name`, is larger."""
        if problem := self.problem(value, name):
            raise InputError(problem, remedy)

    def problem(self, value: float, name: str) -> str:
        """Say what is wrong with a value; empty if nothing is."""
        return f"{name} is {shown(value)}, {self}" if value > self.maximum else ""

    def whole(self, digits: str, name: str) -> int:
        """Read a number of decimal digits; raises InputError."""
        short = digits.lstrip("0") or "0"
        if len(short) > DIGITS:
            raise InputError(f"{name} has {len(short)} digits, {self}", SMALLER)
        self.check(int(short), name)
        return int(short)


def shown(value: float) -> str:
    """A number as messages tell it: Python refuses to write out very large ones."""
    if isinstance(value, int) and abs(value) >= 10**DIGITS:
        return f"about 2**{value.bit_length() - 1}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


# ---------------------------------------------------------------- models

CHANNELS = Bound(4096, "channels", "images have 3, latents of known VAEs 4 to 128")
SIDE = Bound(16384, "pixels or latents a side", "the attention of one image would not fit any memory")
FACTOR = Bound(64, "pixels along a latent", "those of known VAEs have 8 to 32")
SIDE_PIXELS = Bound(SIDE.maximum * FACTOR.maximum, "pixels a side", "latents would have more than a model takes")
TOKENS = Bound(1 << 18, "spatial tokens", "a table of their positions is held in memory")
WIDTH = Bound(65536, "numbers a token", "the widest transformers published have 18,432")
HEADS = Bound(1024, "heads", "the largest transformers published have 128")
BLOCKS = Bound(1024, "blocks", "every block is written into the graph")
GROUP_SIDE = Bound(64, "tokens along a group", "its square is the number of budgets, each of which is listed")
BUDGETS = Bound(GROUP_SIDE.maximum**2, "latents kept", "no group has more")
TEXT = Bound(1024, "tokens of text", "models with text have positions for no more")
MLP_RATIO = Bound(64, "times the width", "transformers have 4 to 8")
CLASSES = Bound(1_000_000, "classes", "every one has a row of its own in a table")
PARTS = Bound(64, "parts in a stage", "every one becomes layers of the graph; known VAEs have 1 to 6")
VAE_CHANNELS = Bound(16384, "channels in a layer", "known VAEs have at most 2,048")
VOCABULARY = Bound(4_000_000, "tokens in a vocabulary", "every one has a row of its own in a table")
TRAINED_PARAMETERS = Bound(
    1_000_000_000, "parameters", "training holds each five times in float32, in the memory of one machine"
)

# ---------------------------------------------------------------- samplings and engines

STEPS = Bound(10_000, "steps", "samplings are converged at a few hundred, and each step is kept in a list")
IMAGES = Bound(1_000_000, "images in a call", "their noise and samples are held in memory together")
ROWS = Bound(1 << 20, "rows of an engine", "memory for all of them is taken when the engine is opened")
TILE = Bound(1024, "latents a side of a tile", "larger samples are cut into tiles")

# ---------------------------------------------------------------- measuring and training

TRAJECTORIES = Bound(100_000, "trajectories", "what each shows is held in memory")
SAMPLES = Bound(1_000_000, "samples", "they are held in memory together; calibrations use some hundreds")
ROUNDS = Bound(100_000, "rounds", "every time is kept")
SAMPLINGS = Bound(10_000_000, "samplings", "a longer soak would take months")
TRAINING_STEPS = Bound(100_000_000, "steps", "more would take years")
BATCH = Bound(65536, "images in a batch", "a batch is held in memory together with what its layers compute")
FEATURES = Bound(4096, "numbers in a layer of a classifier", "the square root of its covariance is taken")
DATA_BYTES = Bound(64 << 30, "bytes of images", "all of them are held in memory")
