"""A guidance with three branches, of which two run at the budget of the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elit_export.arrays import Float64, HostArray
from elit_export.runtime.guidance import STRONG, WEAK, Branch, Guidance
from elit_export.spec import Budget


class Three(Guidance):
    """The class at the budget of the step, the class at the budget `weak`, and no class at the budget of the step."""

    def branches(self, budget: Budget, t: float) -> tuple[Branch, ...]:
        assert self.weak
        return (
            Branch(STRONG, budget, null_class=False),
            Branch(WEAK, self.weak, null_class=False),
            Branch("null", budget, null_class=True),
        )

    def combine(self, velocities: Sequence[HostArray], *, patch: int) -> Float64:
        """Not symmetric in any two, so that their order shows."""
        strong, weak, null = (velocity.astype(np.float64) for velocity in velocities)
        return strong + (strong - weak) + self.scale * (strong - null)
