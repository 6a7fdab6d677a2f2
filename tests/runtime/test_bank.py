"""The engine bank: the right engine for a budget, one call at a time, closed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from elit_export.arrays import HostArray
from elit_export.backends.protocols import FunctionEngine, to_host
from elit_export.errors import EngineError, InputError
from elit_export.runtime.bank import EngineBank, Slot
from elit_export.spec import STEP, Budget, Precision, Profile, Range, default_profiles
from tests.helpers import tiny_spec

BUDGETS = tuple(Budget(kept, 16) for kept in range(1, 17))
ROWS = Range(1, 4, 8)
Arrays = Mapping[str, HostArray]


class CountingEngine(FunctionEngine):
    """Counts how often it is closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


def halved(inputs: Arrays) -> Arrays:
    return {"velocity": inputs["x"] / 2}


def bank_of(*profiles: Profile, function: Callable[[Arrays], Arrays] = halved) -> EngineBank:
    return EngineBank([Slot(profile, FunctionEngine(function)) for profile in profiles], BUDGETS, Precision.FP32)


def profile(name: str, latents: tuple[int, int, int], rows: tuple[int, int, int] = (1, 4, 8)) -> Profile:
    return Profile(name, Range(*latents), Range(*rows))


def inputs(rows: int = 2) -> dict[str, HostArray]:
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 1, 2, 2)
    return {"x": x, "t": np.ones(rows, np.float32), "y": np.zeros(rows, np.int64)}


# ---------------------------------------------------------------- choosing


def test_default_profiles_serve_every_budget_from_its_range() -> None:
    bank = bank_of(*default_profiles(16, ROWS))
    names = [bank.slot_for(budget, 1).profile.name for budget in BUDGETS]
    assert names == ["sixteenth"] * 2 + ["quarter"] * 2 + ["half"] * 8 + ["full"] * 4


def test_short_text_is_filled_up_to_what_takes_the_least() -> None:
    seen = []

    def note(inputs: Arrays) -> Arrays:
        seen.append(inputs["text_mask"].tolist())
        return halved(inputs)

    wide, narrow = (replace(profile("p", (1, 16, 16)), text=Range(least, 8, 9)) for least in (4, 3))
    bank = bank_of(wide, narrow, function=note)
    for tokens, run in ((1, 3), (3, 3), (5, 5)):
        slot = bank.slot_for(BUDGETS[-1], 2, tokens)
        assert slot.profile.tokens(tokens) == run
        text = {"text": np.ones((2, tokens, 4), np.float32), "text_mask": np.ones((2, tokens), np.int64)}
        served = bank(BUDGETS[-1], inputs() | text)
        assert (served.slot, served.text) == (slot, slot.profile.tokens(tokens))
        assert seen.pop() == [[1] * tokens + [0] * (run - tokens)] * 2
    with pytest.raises(InputError, match=r"prompts of 10 tokens: profile p takes 4\.\.8\.\.9, p takes 3\.\.8\.\.9"):
        bank.slot_for(BUDGETS[-1], 2, 10)


def test_of_two_ranges_the_one_with_the_nearer_opt_serves() -> None:
    bank = bank_of(profile("low", (1, 4, 16)), profile("high", (1, 12, 16)))
    names = [bank.slot_for(Budget(kept, 16), 1).profile.name for kept in (1, 7, 9, 16)]
    assert names == ["low", "low", "high", "high"]


def test_a_profile_that_cannot_take_the_rows_is_passed_over() -> None:
    bank = bank_of(profile("near", (1, 4, 16), (1, 1, 2)), profile("far", (1, 12, 16), (1, 4, 8)))
    assert bank.slot_for(Budget(4, 16), 2).profile.name == "near"
    assert bank.slot_for(Budget(4, 16), 3).profile.name == "far"


def test_what_is_covered_and_what_is_not() -> None:
    bank = bank_of(profile("low", (1, 1, 2)), profile("high", (13, 16, 16)))
    assert [budget.kept for budget in bank.coverage.covered] == [1, 2, 13, 14, 15, 16]


def test_an_uncovered_budget_is_refused_with_the_covered_ones() -> None:
    bank = bank_of(profile("high", (13, 16, 16)))
    told = "no profile covers budget 4of16; covered: 13of16 to 16of16.*add a profile to the recipe and build again"
    with pytest.raises(InputError, match=told):
        bank(Budget(4, 16), inputs())


@pytest.mark.parametrize("rows", [1, 9])
def test_rows_out_of_range_are_refused_with_every_serving_profile(rows: int) -> None:
    bank = bank_of(profile("a", (1, 4, 16), (2, 4, 8)), profile("b", (1, 12, 16), (2, 2, 4)))
    told = f"{rows} rows at budget 4of16: profile a takes 2..4..8 rows, b takes 2..2..4 rows .*give it another number"
    with pytest.raises(InputError, match=told):
        bank(Budget(4, 16), inputs(rows))


def test_a_budget_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="4of64"):
        bank_of(*default_profiles(16, ROWS)).slot_for(Budget(4, 64), 1)


# ---------------------------------------------------------------- calling


def test_an_engine_gets_the_first_k_latents_as_numbers() -> None:
    seen: list[Arrays] = []

    def function(arrays: Arrays) -> Arrays:
        seen.append(arrays)
        return halved(arrays)

    bank_of(profile("all", (1, 8, 16)), function=function)(Budget(5, 16), inputs())
    assert set(seen[0]) == {"x", "t", "y", "latents"}
    assert seen[0]["latents"].dtype == np.int64
    assert seen[0]["latents"].tolist() == [0, 1, 2, 3, 4]


def test_only_the_chosen_engine_runs() -> None:
    ran: list[str] = []

    def named(name: str) -> FunctionEngine:
        def function(arrays: Arrays) -> Arrays:
            ran.append(name)
            return halved(arrays)

        return FunctionEngine(function)

    slots = [Slot(each, named(each.name)) for each in default_profiles(16, ROWS)]
    bank = EngineBank(slots, BUDGETS, Precision.FP32)
    for kept in (16, 1, 8, 3):
        bank(Budget(kept, 16), inputs())
    assert ran == ["full", "sixteenth", "half", "quarter"]


def test_outputs_belong_to_the_caller_even_if_a_function_reuses_its_buffer() -> None:
    buffers = {"velocity": np.empty((2, 1, 2, 2), np.float32), "residual": np.empty((2, 1, 2, 2), np.float32)}

    def function(arrays: Arrays) -> Arrays:
        for buffer in buffers.values():
            buffer[:] = arrays["x"]
        return buffers

    bank = bank_of(profile("all", (1, 8, 16)), function=function)
    first = bank(Budget(1, 16), inputs()).outputs
    bank(Budget(1, 16), {**inputs(), "x": inputs()["x"] + 100})
    assert np.array_equal(to_host(first["velocity"]), inputs()["x"])
    assert np.array_equal(to_host(first["residual"]), inputs()["x"])


def test_a_residual_goes_back_in_as_it_came_out() -> None:
    def function(arrays: Arrays) -> Arrays:
        return {"velocity": arrays["x"] + arrays.get("residual", 0), "residual": arrays["x"]}

    slot = Slot(profile("all", (1, 8, 16)), FunctionEngine(function, tiny_spec().graph(STEP)))
    bank = EngineBank([slot], BUDGETS, Precision.FP32)
    residual = bank(Budget(1, 16), inputs()).outputs["residual"]
    assert not isinstance(residual, np.ndarray)
    again = bank(Budget(16, 16), {**inputs(), "residual": residual}).outputs
    assert np.array_equal(to_host(again["velocity"]), 2 * inputs()["x"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_velocity_that_is_not_finite_names_profile_precision_and_budget(value: float) -> None:
    def function(arrays: Arrays) -> Arrays:
        velocity = arrays["x"].copy()
        velocity[-1, 0, 1, 1] = value
        return {"velocity": velocity}

    told = r"profile quarter \(fp32\) at budget 4of16 gave a velocity that is not finite"
    with pytest.raises(EngineError, match=told):
        bank_of(*default_profiles(16, ROWS), function=function)(Budget(4, 16), inputs())


# ---------------------------------------------------------------- threads and closing


def test_calls_of_several_threads_take_turns() -> None:
    running, most = 0, 0

    def function(arrays: Arrays) -> Arrays:
        nonlocal running, most
        running += 1
        most = max(most, running)
        pause.wait(0.002)  # lets the other threads in, if nothing holds them back
        running -= 1
        return halved(arrays)

    pause = threading.Event()
    bank = bank_of(*default_profiles(16, ROWS), function=function)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(bank, BUDGETS[kept], inputs()) for kept in (0, 5, 10, 15) * 4]:
            assert np.array_equal(to_host(done.result().outputs["velocity"]), inputs()["x"] / 2)
    assert most == 1


def test_an_engine_that_serves_two_profiles_is_closed_once() -> None:
    shared, alone = CountingEngine(halved), CountingEngine(halved)
    low, middle, high = profile("low", (1, 1, 4)), profile("middle", (5, 8, 8)), profile("high", (9, 16, 16))
    bank = EngineBank([Slot(low, shared), Slot(middle, alone), Slot(high, shared)], BUDGETS, Precision.FP32)
    bank.close()
    assert (shared.closed, alone.closed) == (1, 1)


def test_every_engine_is_closed_though_one_fails() -> None:
    class FailingEngine(CountingEngine):
        def close(self) -> None:
            super().close()
            raise EngineError("cannot close")

    engines = [CountingEngine(halved), FailingEngine(halved), CountingEngine(halved)]
    bank = EngineBank([Slot(profile("all", (1, 8, 16)), engine) for engine in engines], BUDGETS, Precision.FP32)
    with pytest.raises(EngineError, match="cannot close"):
        bank.close()
    assert [engine.closed for engine in engines] == [1, 1, 1]


def test_with_closes_the_engines_and_closing_again_does_nothing() -> None:
    engine = CountingEngine(halved)
    with EngineBank([Slot(profile("all", (1, 8, 16)), engine)], BUDGETS, Precision.FP32) as bank:
        assert engine.closed == 0
        bank.close()
    assert engine.closed == 1


def test_a_closed_bank_refuses_and_says_what_to_do() -> None:
    bank = bank_of(*default_profiles(16, ROWS))
    bank.close()
    with pytest.raises(EngineError, match="bank is closed; load the pipeline again"):
        bank(Budget(16, 16), inputs())


def test_closing_waits_for_a_call_in_progress() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def function(arrays: Arrays) -> Arrays:
        inside.set()
        assert go_on.wait(5)
        assert engine.closed == 0
        return halved(arrays)

    engine = CountingEngine(function)
    bank = EngineBank([Slot(profile("all", (1, 8, 16)), engine)], BUDGETS, Precision.FP32)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(bank, Budget(16, 16), inputs())
        assert inside.wait(5)
        closing = pool.submit(bank.close)
        assert not threading.Event().wait(0.02)
        assert not closing.done()
        go_on.set()
        call.result(5)
        closing.result(5)
    assert engine.closed == 1
