"""Which profile serves a call, and which step caches can run: read from the manifest, before engines are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from elit_export.errors import CalibrationError, InputError
from elit_export.runtime.samplers.calibrated import NO_SOLVERS
from elit_export.runtime.step_cache.base import Rule
from elit_export.runtime.step_cache.fit import IDENTITY
from elit_export.spec import Budget, Fit, Profile, Range, SolverFacts, listed

UNCALIBRATED = "there is none: elit-export calibrate cache BUNDLE"


class CallSize(NamedTuple):
    """The size of one engine call: K, rows, tokens of text (0 in models without) before they are padded."""

    budget: Budget
    rows: int
    text: int


@dataclass(frozen=True)
class Coverage:
    """The profiles of a plan set, the budgets that the model can run, and the graphs of the step cache.

    A calibrated rule of the step cache decides by `fits`; without them `uncalibrated` says why, and how to
    make them. `solvers` are the tables that were calibrated for the model; `no_solvers` says why there
    are none.
    """

    profiles: tuple[Profile, ...]
    budgets: tuple[Budget, ...]
    graphs: frozenset[str] = frozenset()
    fits: Mapping[Budget, Fit] | None = None
    uncalibrated: str = UNCALIBRATED
    solvers: tuple[SolverFacts, ...] = ()
    no_solvers: str = NO_SOLVERS

    @cached_property
    def _known(self) -> frozenset[Budget]:  # used at each call
        return frozenset(self.budgets)

    @property
    def covered(self) -> tuple[Budget, ...]:
        return tuple(budget for budget in self.budgets if self.serving(budget))

    @property
    def text(self) -> Range | None:
        """The range of text tokens that the engines accept; None in models without text."""
        return self.profiles[0].text

    @property
    def tokens(self) -> int:
        """The usual length of text; 0 in models without text."""
        return self.text.opt if self.text else 0

    @property
    def longest_text(self) -> int:
        """The maximum of tokens that any engine accepts; 0 in models without text."""
        return max((profile.text.max for profile in self.profiles if profile.text), default=0)

    def serving(self, budget: Budget) -> list[Profile]:
        """List the profiles that run a budget; raises InputError for one that the model cannot run."""
        if budget not in self._known:
            raise InputError(f"this model cannot run budget {budget}; it runs {listed(self.budgets)}")
        return [profile for profile in self.profiles if budget.kept in profile.latents]

    def profiles_for(self, budget: Budget, text: int = 0) -> list[Profile]:
        """The profiles that run a budget on so many tokens of text; raises InputError where there are none."""
        serving = self.serving(budget)
        if not serving:
            raise InputError(
                f"no profile covers budget {budget}; covered: {listed(self.covered)}",
                "choose one of these, or add a profile to the recipe and build again",
            )
        reading = [profile for profile in serving if profile.text is None or profile.tokens(text) in profile.text]
        if not reading:
            limits = ", ".join(f"{profile.name} takes {profile.text}" for profile in serving)
            raise InputError(
                f"prompts of {text} tokens: profile {limits} (min..opt..max)",
                "choose other prompts, or build with another `text`",
            )
        return reading

    def profile_for(self, budget: Budget, rows: int, text: int = 0) -> Profile:
        """Return the profile that holds K, rows and tokens of text with its opt nearest to K; raises InputError.

        If text is shorter than all of them accept, it is the profile that needs the least padding.
        """
        reading = self.profiles_for(budget, text)
        fitting = [profile for profile in reading if rows in profile.rows]
        if not fitting:
            raise InputError(
                f"{rows} rows at budget {budget}: profile {row_limits(reading)}",
                "give it another number of rows (guidance may need several an image), or build with other `rows`",
            )
        return min(fitting, key=lambda profile: (profile.tokens(text), abs(profile.latents.opt - budget.kept)))

    def fits_for(self, rule: Rule) -> Mapping[Budget, Fit] | None:
        """Return the fits by which a rule of the step cache decides; None if it measures nothing.

        Raises InputError if the plan set lacks a graph that it calls, CalibrationError naming the command that
        makes the fits.
        """
        if missing := sorted(rule.needs - self.graphs):
            raise InputError(
                f"these engines have no graph `{missing[0]}`", "build the bundle again, or leave cache out"
            )
        if not rule.calibrated:
            return dict.fromkeys(self.budgets, IDENTITY) if rule.measures else None
        if self.fits is None:
            raise CalibrationError(
                f"cache {rule} needs a calibration", f"{self.uncalibrated}; or use a cache policy of the family static"
            )
        return self.fits


def row_limits(profiles: Sequence[Profile]) -> str:
    """Say how many rows each profile takes."""
    return ", ".join(f"{profile.name} takes {profile.rows} rows" for profile in profiles) + " (min..opt..max)"
