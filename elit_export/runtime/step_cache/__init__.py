"""Step caching: the policies that decide which evaluations reuse an earlier output of the blocks.

    static:every@3            every third step computes
    static:mask@1011…         one digit a step, 1 computes
    static:time@0.3           by the change of the embedding of t
    static:FILE               a file with such digits, no comma in its name
    teacache:0.2              measures at each step how much the input changed, reuses while the sum is less
    … ,order=1                how the residual is forecast: 0 as it is, 1 linearly in t
    … ,max_skip=2             maximum of consecutive reuses; 4 for rules that measure a change, no limit for the others
    … ,warmup=3               steps at the start that compute

The residual is reused: the tokens before the final layer minus those after the embedder. It has
the same shape at all budgets. The first and the last step always compute. The family `static` is
fixed before sampling starts and makes no extra call at a step; `teacache` needs a calibration.

To add a rule, write a file beside these and a row in the table below.
"""

from __future__ import annotations

from elit_export.errors import InputError
from elit_export.runtime.step_cache.base import Form, Rule, RuleText
from elit_export.runtime.step_cache.every import Every
from elit_export.runtime.step_cache.mask import Mask, mask_from_file
from elit_export.runtime.step_cache.teacache import TeaCache
from elit_export.runtime.step_cache.time_distance import TimeDistance

FORMS = (
    Form("static:every@", "N", Every.parse, bench_values=("2", "3", "4")),
    Form("static:mask@", "1011…", Mask.parse),
    Form("static:time@", "THRESHOLD", TimeDistance.parse, bench_values=("0.05", "0.1")),
    Form("static:", "FILE", mask_from_file),
    Form("teacache:", "THRESHOLD", TeaCache.parse, bench_values=("0.05", "0.1", "0.2")),
)
USAGE = (
    f"{', '.join(f'{form.prefix}{form.placeholder}' for form in FORMS)}, "
    "with ,order=0|1 ,max_skip=N ,warmup=N behind it, or none"
)


def rule_from_text(text: str, policy: str) -> Rule:
    """Read the part of a policy before its options, by the form with the longest prefix; raises InputError."""
    forms = [form for form in FORMS if form.matches(text)]
    form = max(forms, key=lambda form: len(form.prefix), default=None)
    rule = form.parse(RuleText(text[len(form.prefix) :], policy, USAGE)) if form else None
    if rule is None:
        raise InputError(f"cache {policy!r} is none of: {USAGE}")
    return rule


def bench_policies() -> list[str]:
    """List the policies that a bench compares, without options."""
    return [f"{form.prefix}{value}" for form in FORMS for value in form.bench_values]
