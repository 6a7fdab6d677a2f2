"""The training loop: what it draws, that it learns, that it resumes bit for bit, and the held-out errors."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elit_export.errors import CheckpointError, InputError
from elit_export.models.elit import initialise
from elit_export.models.sit import ElitSiT
from elit_export.spec import PIXELS, ModelSpec
from elit_export.training import evaluate
from elit_export.training.data import LabelledImages, load_images
from elit_export.training.evaluate import BudgetError, held_out_errors
from elit_export.training.trainer import (
    TrainConfig,
    Trainer,
    TrainRecord,
    flow_batch,
    generator_for,
    random_times,
    to_signal,
)
from tests.helpers import tiny_model, tiny_spec

FASHION = Path(__file__).parents[1] / "data" / "fashion"
FACTS: dict[str, Any] = {"input_size": 32, "patch_size": 8, "num_classes": 10}
SPEC = tiny_spec(**FACTS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few hundred numbers gain nothing from threads, and lose much when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fashion() -> LabelledImages:
    return load_images(FASHION, split="train", size=32)


def config(**changes: Any) -> TrainConfig:
    values = {
        "steps": 12,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "ema_decay": 0.9,
        "label_dropout": 0.1,
        "min_kept": 1,
        "full_share": 0.0,
        "seed": 0,
    }
    return TrainConfig(**(values | changes))


def trainer(data: LabelledImages, spec: ModelSpec = SPEC, **changes: Any) -> Trainer:
    return Trainer(spec, PIXELS, data, config(**changes))


def run(data: LabelledImages, *, stop: int | None = None, **changes: Any) -> tuple[Trainer, list[TrainRecord]]:
    """A run to its end, or to step `stop`."""
    one = trainer(data, **changes)
    return one, list(islice(one.run(), stop))


def flat(values: object) -> dict[str, Any]:
    """Nested tables and lists as one table of paths."""
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {f"{key}/{path}": leaf for key, value in pairs for path, leaf in flat(value).items()}
    return {"": values}


def assert_same_state(one: Trainer, other: Trainer) -> None:
    for part in ("model", "ema", "optimizer"):
        mine, theirs = flat(getattr(one, part).state_dict()), flat(getattr(other, part).state_dict())
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            same = torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
            assert same, (part, name)
    assert one.step == other.step


def unique_labels(data: LabelledImages) -> LabelledImages:
    """The same images, each a class of its own."""
    return replace(data, labels=np.arange(len(data)))


def labels_seen(data: LabelledImages, **changes: Any) -> list[list[int]]:
    """The labels that went into the model, step by step."""
    one = trainer(data, tiny_spec(**(FACTS | {"num_classes": data.num_classes})), **changes)
    seen: list[list[int]] = []
    one.model.y_embedder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].tolist()))
    list(one.run())
    return seen


# ---------------------------------------------------------------- the flow


def test_the_flow_leads_from_data_to_noise() -> None:
    data, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(3)
    at = {time: flow_batch(data, torch.full((3,), time), y, noise) for time in (0.0, 0.25, 1.0)}
    assert torch.equal(at[0.0].x, data)
    assert torch.equal(at[1.0].x, noise)
    assert all(torch.equal(batch.velocity, noise - data) for batch in at.values())
    torch.testing.assert_close(at[0.25].x, data + 0.25 * at[0.25].velocity)


def test_times_are_the_sigmoid_of_a_standard_normal() -> None:
    logits = torch.logit(random_times(20_000, generator_for(1)))
    assert abs(logits.mean().item()) < 0.03
    assert logits.std().item() == pytest.approx(1, abs=0.03)


def test_bytes_become_the_range_minus_one_to_one() -> None:
    assert to_signal(np.array([0, 51, 255], np.uint8)).tolist() == pytest.approx([-1, -0.6, 1])


def test_generators_depend_on_every_number() -> None:
    draws = {torch.rand((), generator=generator_for(*numbers)).item() for numbers in [(1, 2), (2, 1), (1, 3), (1,)]}
    assert len(draws) == 4
    assert torch.rand((), generator=generator_for(1, 2)).item() in draws


# ---------------------------------------------------------------- learning


def test_the_loss_falls(fashion: LabelledImages) -> None:
    """The first loss is that of a model that says nothing."""
    one, records = run(fashion, steps=60)
    losses = [record.loss for record in records]
    assert [record.step for record in records] == list(range(1, 61))
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    held_out = load_images(FASHION, split="test", size=32)
    assert errors_of(one.ema, held_out)[4].mse < 0.7 * errors_of(trainer(fashion).ema, held_out)[4].mse


def test_the_first_loss_is_the_mean_square_of_the_velocity(fashion: LabelledImages) -> None:
    """A fresh model says zero, so its error is what it should have said: E(noise − data)² = 1 + E(data²)."""
    loss = run(fashion, stop=1, batch_size=96)[1][0].loss
    assert loss == pytest.approx(1 + to_signal(fashion.images).square().mean().item(), rel=0.02)


def test_gradients_are_clipped_to_norm_one(fashion: LabelledImages) -> None:
    one = trainer(fashion, learning_rate=0.5)  # makes steep places
    norms = [
        math.sqrt(sum(parameter.grad.square().sum().item() for parameter in one.model.parameters())) for _ in one.run()
    ]
    assert max(norms) == pytest.approx(1, abs=1e-4)


def test_a_first_step_moves_by_the_rate_as_adam_does(fashion: LabelledImages) -> None:
    one, _ = run(fashion, stop=1, warmup_steps=1)
    assert one.model.final.linear.bias.abs().tolist() == pytest.approx([1e-2] * 64, rel=1e-3)


def test_nothing_decays(fashion: LabelledImages) -> None:
    """The row of a label that never comes stays as it was."""
    start, (end, _) = trainer(fashion), run(fashion, label_dropout=0.0)
    assert torch.equal(end.model.y_embedder.weight[10], start.model.y_embedder.weight[10])
    assert not torch.equal(end.model.y_embedder.weight[9], start.model.y_embedder.weight[9])


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(fashion: LabelledImages) -> None:
    seen = labels_seen(unique_labels(fashion), steps=12, label_dropout=0.0)
    first, second = ([label for step in part for label in step] for part in (seen[:6], seen[6:]))
    assert sorted(first) == sorted(second) == list(range(96))
    assert first != second


def test_an_incomplete_last_batch_is_left_out(fashion: LabelledImages) -> None:
    seen = labels_seen(unique_labels(fashion), steps=2, batch_size=60, label_dropout=0.0)
    assert [len(set(step)) for step in seen] == [60, 60]


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)])
def test_labels_are_dropped_to_the_null_class(fashion: LabelledImages, dropout: float, low: float, high: float) -> None:
    seen = [label for step in labels_seen(fashion, steps=20, label_dropout=dropout) for label in step]
    assert low <= seen.count(10) / len(seen) <= high
    assert max(seen) <= 10


# ---------------------------------------------------------------- budgets, rate, moving average


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {1, 2, 3, 4}),
        ({"min_kept": 3}, {3, 4}),
        ({"min_kept": 4}, {4}),
        ({"full_share": 1.0}, {4}),
        ({"full_share": 0.5, "min_kept": 2}, {2, 3, 4}),
    ],
)
def test_kept_latents_are_drawn_from_the_least_to_all(
    fashion: LabelledImages, changes: dict[str, Any], expected: set[int]
) -> None:
    _, records = run(fashion, **({"steps": 40, "batch_size": 1} | changes))
    assert {record.kept for record in records} == expected


def test_a_share_of_the_steps_runs_the_full_budget(fashion: LabelledImages) -> None:
    def full_steps(**changes: Any) -> int:
        _, records = run(fashion, steps=80, batch_size=1, **changes)
        return sum(record.kept == 4 for record in records)

    assert 10 <= full_steps() <= 32  # a quarter of 80
    assert 40 <= full_steps(full_share=0.5) <= 62  # a half, and a quarter of the rest


def test_the_recorded_budget_is_the_one_that_ran(fashion: LabelledImages) -> None:
    one = trainer(fashion)
    lengths: list[int] = []
    one.model.core[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert lengths == [] != [SPEC.groups * record.kept for record in one.run()] == lengths


def test_the_rate_warms_up_linearly_then_falls_as_a_cosine(fashion: LabelledImages) -> None:
    _, records = run(fashion, steps=25, warmup_steps=5, batch_size=1, learning_rate=0.4)
    rates = [record.learning_rate for record in records]
    assert rates[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])
    assert rates[5:] == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])
    assert rates[15] == pytest.approx(0.2)


def test_a_warm_up_longer_than_the_run_never_reaches_the_rate(fashion: LabelledImages) -> None:
    _, records = run(fashion, steps=3, warmup_steps=10, batch_size=1)
    assert [record.learning_rate for record in records] == pytest.approx([1e-3, 2e-3, 3e-3])


@pytest.mark.parametrize("limit", [0.0, 0.2, 0.999])
def test_the_moving_average_ramps_up_to_its_decay(fashion: LabelledImages, limit: float) -> None:
    one = trainer(fashion, ema_decay=limit, steps=5)
    expected = one.model.core[0].attn.qkv.weight.detach().clone()
    for step, _ in enumerate(one.run()):
        decay = min(limit, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * one.model.core[0].attn.qkv.weight.detach()
        torch.testing.assert_close(one.ema.core[0].attn.qkv.weight, expected, rtol=1e-5, atol=1e-6)
    assert all(not parameter.requires_grad for parameter in one.ema.parameters())


# ---------------------------------------------------------------- same seed, same run


def test_the_same_seed_gives_the_same_run_bit_for_bit(fashion: LabelledImages) -> None:
    (one, records), (same, same_records) = run(fashion), run(fashion)
    assert records == same_records
    assert_same_state(one, same)


def test_another_seed_gives_another_start_and_another_run(fashion: LabelledImages) -> None:
    assert not torch.equal(trainer(fashion).model.read.query, trainer(fashion, seed=1).model.read.query)
    assert [record.loss for record in run(fashion)[1]] != [record.loss for record in run(fashion, seed=1)[1]]


def test_a_run_leaves_the_global_generator_alone(fashion: LabelledImages) -> None:
    one = trainer(fashion)
    before = torch.get_rng_state()
    next(one.run())
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- saving and going on


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    fashion: LabelledImages, tmp_path: Path, stop: int
) -> None:
    whole, records = run(fashion)
    first, _ = run(fashion, stop=stop)
    first.save(tmp_path / "state.pt")
    second = trainer(fashion)
    second.resume(tmp_path / "state.pt")
    assert_same_state(second, first)
    assert list(second.run()) == records[stop:]
    assert_same_state(second, whole)


def test_saving_does_not_disturb_the_run(fashion: LabelledImages, tmp_path: Path) -> None:
    whole, _ = run(fashion)
    saved = trainer(fashion)
    for _ in saved.run():
        saved.save(tmp_path / "state.pt")
    assert_same_state(saved, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("seed", 1, r"seed \(was 0, now 1\)"),
        ("learning_rate", 0.5, r"learning_rate \(was 0.01, now 0.5\)"),
        ("min_kept", 2, r"min_kept \(was 1, now 2\)"),
    ],
)
def test_the_state_of_another_run_is_refused_by_its_difference(
    fashion: LabelledImages, tmp_path: Path, name: str, value: float, told: str
) -> None:
    trainer(fashion).save(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=f"belongs to another run: {told}; train into another folder"):
        trainer(fashion, **{name: value}).resume(tmp_path / "state.pt")


def test_a_run_is_extended_along_the_learning_rate_of_its_new_length(fashion: LabelledImages, tmp_path: Path) -> None:
    one, _ = run(fashion)  # to its end, where the rate is almost zero
    one.save(tmp_path / "state.pt")
    longer = trainer(fashion, steps=24)
    assert longer.resume(tmp_path / "state.pt") == 12
    records = list(longer.run())
    _, fresh = run(fashion, steps=24)
    assert [record.step for record in records] == list(range(13, 25))
    assert [record.learning_rate for record in records] == [record.learning_rate for record in fresh[12:]]
    assert [record.kept for record in records] == [record.kept for record in fresh[12:]]


def test_a_run_is_not_cut_to_fewer_steps_than_it_has_done(fashion: LabelledImages, tmp_path: Path) -> None:
    one, _ = run(fashion, stop=5)
    one.save(tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"already at step 5, past the last of steps=4; give steps=5 or more"):
        trainer(fashion, steps=4).resume(tmp_path / "state.pt")
    assert trainer(fashion, steps=5).resume(tmp_path / "state.pt") == 12


def test_a_state_from_before_there_were_other_backbones_goes_on(fashion: LabelledImages, tmp_path: Path) -> None:
    one, _ = run(fashion, stop=2)
    one.save(tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in ("backbone", "rope", "qk_norm_kind", "merge", "coarse_depth", "text_width"):
        del state["run"][name]
    torch.save(state, tmp_path / "state.pt")
    other = trainer(fashion)
    other.resume(tmp_path / "state.pt")
    assert other.step == 2


def test_the_state_of_another_model_is_refused(fashion: LabelledImages, tmp_path: Path) -> None:
    trainer(fashion).save(tmp_path / "state.pt")
    other = trainer(fashion, tiny_spec(**FACTS, core_depth=3))
    with pytest.raises(CheckpointError, match=r"core_depth \(was 2, now 3\)"):
        other.resume(tmp_path / "state.pt")


@pytest.mark.parametrize("part", ["images", "labels"])
def test_the_state_of_a_run_on_other_data_is_refused(fashion: LabelledImages, tmp_path: Path, part: str) -> None:
    inverted = {"images": 255 - fashion.images, "labels": 9 - fashion.labels}
    trainer(replace(fashion, **{part: inverted[part]})).save(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="belongs to another run: data"):
        trainer(fashion).resume(tmp_path / "state.pt")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99, -1])
def test_a_truncated_state_is_refused_and_changes_nothing(fashion: LabelledImages, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "state.pt"
    run(fashion, stop=2)[0].save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if 0 < kept < 1 else int(kept)])
    one = trainer(fashion)
    with pytest.raises(CheckpointError, match=r"state\.pt: not a whole training state"):
        one.resume(path)
    assert_same_state(one, trainer(fashion))


@pytest.mark.parametrize("content", [{}, [1], {"format": "elit_export training state/0"}, {"ema": {}}])
def test_another_file_of_torch_is_refused(fashion: LabelledImages, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not a training state of this version"):
        trainer(fashion).resume(tmp_path / "state.pt")


@pytest.mark.parametrize("part", ["run", "step", "model", "ema", "optimizer"])
def test_a_state_without_a_part_is_refused_and_changes_nothing(
    fashion: LabelledImages, tmp_path: Path, part: str
) -> None:
    path = tmp_path / "state.pt"
    run(fashion, stop=2)[0].save(path)
    state = torch.load(path, weights_only=True)
    del state[part]
    torch.save(state, path)
    one = trainer(fashion)
    with pytest.raises(CheckpointError):
        one.resume(path)
    assert_same_state(one, trainer(fashion))


def nan_in(path: str) -> Callable[[dict[str, Any]], None]:
    """Put NaN where a path of keys leads."""

    def damage(state: dict[str, Any]) -> None:
        *keys, last = path.split("/")
        for key in keys:
            state = state[int(key) if key.isdigit() else key]
        state[last] = math.nan

    return damage


def changed(part: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__setitem__(part, value)


def weight(change: Callable[[Tensor], Any], part: str = "model") -> Callable[[dict[str, Any]], None]:
    """Change one tensor of a part."""
    return lambda state: state[part].update({"read.query": change(state[part]["read.query"])})


def moment(change: Callable[[Tensor], Any], key: str = "exp_avg") -> Callable[[dict[str, Any]], None]:
    return lambda state: state["optimizer"]["state"][3].update({key: change(state["optimizer"]["state"][3][key])})


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a step of 10^30": (changed("step", 10**30), "its step is 10{30}, must be a whole number from 0 to"),
    "a negative step": (changed("step", -1), "its step is -1, must"),
    "a step that is NaN": (changed("step", math.nan), "its step is nan, must"),
    "a step that is text": (changed("step", "2"), "its step is '2', must"),
    "a step that is true": (changed("step", True), "its step is True, must"),
    "a step that is a tensor": (changed("step", torch.ones(2)), "its step is tensor"),
    "another step than the optimizer's": (changed("step", 1), "its optimizer is at step 2 of .*, the run at step 1"),
    "a run that is a list": (changed("run", [1]), "does not say of which run"),
    "a run with a tensor": (lambda state: state["run"].update(seed=torch.ones(2)), "belongs to another run: seed"),
    "a model that is a list": (changed("model", [1]), "its model is not a table of tensors"),
    "weights by number": (changed("ema", {1: torch.ones(1)}), "its ema is not a table of tensors"),
    "a weight that is text": (weight(lambda _: "x"), "its model is not a table of tensors"),
    "a weight of another shape": (weight(lambda tensor: tensor[:1]), "read.query has shape"),
    "a weight of whole numbers": (weight(lambda tensor: tensor.long(), "ema"), "read.query holds torch.int64"),
    "a missing weight": (lambda state: state["model"].pop("read.query"), "missing read.query"),
    "one weight more": (lambda state: state["ema"].update(more=torch.ones(1)), "unexpected more"),
    "a meta weight": (weight(lambda tensor: tensor.to("meta")), r"read\.query is a meta \(without numbers\) tensor"),
    "a sparse weight": (weight(lambda tensor: tensor.to_sparse()), "read.query is a sparse tensor; save dense ones"),
    "a quantized weight": (
        weight(lambda tensor: torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8)),
        "read.query is a quantized tensor",
    ),
    "an optimizer that is text": (changed("optimizer", "adam"), "no group of parameters"),
    "an optimizer without groups": (lambda state: state["optimizer"].pop("param_groups"), "no group of parameters"),
    "a group that is a list": (lambda state: state["optimizer"].update(param_groups=[[1]]), "no group of parameters"),
    "a rate that is NaN": (nan_in("optimizer/param_groups/0/lr"), "learning rate of its optimizer is nan"),
    "moments of fewer parameters": (lambda state: state["optimizer"]["state"].pop(3), "does not hold the"),
    "moments that are a list": (lambda state: state["optimizer"].update(state=[1]), "does not hold the"),
    "a moment that is text": (moment(lambda _: "x"), "no step and moments of"),
    "a moment of another shape": (moment(lambda tensor: torch.ones(7)), r"exp_avg has shape \(7,\)"),
    "a sparse moment": (moment(lambda tensor: tensor.to_sparse()), "exp_avg is a sparse tensor"),
    "a moment at a step of NaN": (moment(lambda tensor: tensor * math.nan, "step"), "its optimizer is at step nan"),
}


@pytest.fixture(scope="module")
def saved(fashion: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole state, two steps in. Do not change it: copy it first."""
    path = tmp_path_factory.mktemp("saved") / "state.pt"
    run(fashion, stop=2)[0].save(path)
    return path


@pytest.mark.filterwarnings("ignore:.*(quantize|sparse|Sparse|deprecated)")  # torch's, of what damage is made with
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_told_in_words_and_changes_nothing(
    fashion: LabelledImages, saved: Path, tmp_path: Path, kind: str
) -> None:
    damage, told = DAMAGE[kind]
    state = torch.load(saved, weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "state.pt")
    one = trainer(fashion)
    with pytest.raises(CheckpointError, match=told) as caught:
        one.resume(tmp_path / "state.pt")
    assert caught.value.remedy
    assert_same_state(one, trainer(fashion))


def test_bytes_of_a_state_that_changed_never_end_in_a_traceback(
    fashion: LabelledImages, saved: Path, tmp_path: Path
) -> None:
    """In its table of contents, where the pickle is, and at its end; most are told by a checksum or by the reader."""
    whole, one, path = saved.read_bytes(), trainer(fashion), tmp_path / "state.pt"
    start = whole.index(b"data.pkl")
    for place in [*range(start, start + 2000, 50), *range(len(whole) - 400, len(whole), 20)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(CheckpointError):
            one.resume(path)


def test_a_missing_state_is_named(fashion: LabelledImages, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        trainer(fashion).resume(tmp_path / "nowhere.pt")


class MakesFolder:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("in_zip", [True, False])
def test_code_in_a_state_never_runs(fashion: LabelledImages, tmp_path: Path, in_zip: bool) -> None:
    path, trap = tmp_path / "state.pt", MakesFolder(tmp_path / "code_has_run")
    if in_zip:
        torch.save({"format": "elit_export training state/1", "run": trap}, path)
    else:
        path.write_bytes(pickle.dumps(trap, protocol=2))
    with pytest.raises(CheckpointError, match="not a whole training state"):
        trainer(fashion).resume(path)
    assert not trap.folder.exists()


def test_an_interrupted_save_leaves_the_old_state(
    fashion: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    one = trainer(fashion)
    one.save(path)
    before = path.read_bytes()

    def broken(_: object, temporary: Path) -> None:
        temporary.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        one.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("warmup_steps", 0),
        ("min_kept", 0),
        ("ema_decay", 1.1),
        ("ema_decay", math.nan),
        ("label_dropout", -0.1),
        ("full_share", 2),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("seed", -1),
    ],
)
def test_bad_choices_are_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}, must"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("spec", "changes", "problem"),
    [
        (tiny_spec(**(FACTS | {"input_size": 16})), {}, r"images are \(1, 32, 32\), the model takes \(1, 16, 16\)"),
        (tiny_spec(**(FACTS | {"in_channels": 3})), {}, r"the model takes \(3, 32, 32\)"),
        (tiny_spec(**(FACTS | {"num_classes": 9})), {}, "the data has 10 classes, the model 9"),
        (SPEC, {"batch_size": 97}, "batch_size 97 is more than the 96 images"),
        (SPEC, {"min_kept": 5}, "min_kept 5: this model runs 1of4 to 4of4"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    fashion: LabelledImages, spec: ModelSpec, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        trainer(fashion, spec, **changes)


# ---------------------------------------------------------------- held-out errors


def errors_of(model: ElitSiT, data: LabelledImages, seed: int = 5) -> dict[int, BudgetError]:
    return {error.budget.kept: error for error in held_out_errors(model, data, seed=seed)}


def test_the_full_budget_comes_first_and_is_exactly_zero_above_itself(fashion: LabelledImages) -> None:
    errors = errors_of(tiny_model(**FACTS), fashion)
    assert list(errors) == [4, 3, 2, 1]
    assert (errors[4].above_full, errors[4].above_full_error) == (0.0, 0.0)
    assert all(errors[kept].above_full != 0 for kept in (1, 2, 3))
    for error in errors.values():
        assert error.mse - errors[4].mse == pytest.approx(error.above_full, abs=1e-9)


def test_every_budget_meets_the_same_draws(fashion: LabelledImages) -> None:
    """A model without a core says the same at every budget, so only other draws could tell budgets apart."""
    errors = errors_of(tiny_model(**FACTS, core_depth=0), fashion)
    assert {(error.mse, error.above_full, error.above_full_error) for error in errors.values()} == {
        (errors[4].mse, 0.0, 0.0)
    }


def test_errors_depend_on_the_seed_alone(fashion: LabelledImages) -> None:
    model = tiny_model(**FACTS)
    assert errors_of(model, fashion) == errors_of(model, fashion)
    assert errors_of(model, fashion, seed=6)[4].mse != errors_of(model, fashion)[4].mse


@torch.inference_mode()
def test_errors_equal_a_recomputation_image_by_image(fashion: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "BATCH", 40)  # 96 images are two batches and a rest
    model, generator, kept = tiny_model(**FACTS), generator_for(5), 3
    expected: dict[int, list[float]] = {kept: [], 4: []}
    for start in (0, 40, 80):
        images, labels = fashion.images[start : start + 40], fashion.labels[start : start + 40]
        times = torch.sigmoid(torch.randn(len(labels), generator=generator))
        noises = torch.randn(images.shape, generator=generator)
        for image, label, t, noise in zip(images, labels, times, noises, strict=True):
            data = torch.from_numpy(image).float() / 127.5 - 1
            for budget, errors in expected.items():
                x = ((1 - t) * data + t * noise)[None]
                v = model(x, t[None], torch.tensor([int(label)]), torch.arange(budget))[0]
                errors.append((v - (noise - data)).double().square().mean().item())
    found = errors_of(model, fashion)[kept]
    above = np.array(expected[kept]) - np.array(expected[4])
    assert found.mse == pytest.approx(np.mean(expected[kept]), rel=1e-5)
    assert found.standard_error == pytest.approx(np.std(expected[kept], ddof=1) / math.sqrt(96), rel=1e-4)
    assert found.above_full == pytest.approx(above.mean(), rel=1e-3)
    assert found.above_full_error == pytest.approx(above.std(ddof=1) / math.sqrt(96), rel=1e-3)


def test_shared_draws_make_differences_sharper_than_errors(fashion: LabelledImages) -> None:
    one, _ = run(fashion, steps=20)
    errors = errors_of(one.model.eval(), fashion)
    assert all(errors[kept].above_full_error < 0.5 * errors[kept].standard_error for kept in (1, 2, 3))


def test_a_fresh_model_errs_by_the_velocity_itself(fashion: LabelledImages) -> None:
    model = initialise(ElitSiT(SPEC), generator_for(0))
    expected = 1 + to_signal(fashion.images).square().mean().item()
    assert errors_of(model, fashion)[1].mse == pytest.approx(expected, rel=0.02)
