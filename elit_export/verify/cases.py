"""Which inputs engines are compared on: single steps at every profile's corners, and short trajectories."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from elit_export.arrays import Arrays, Float64
from elit_export.bundle.manifest import ReferenceCase, ReferenceTrajectory
from elit_export.runtime.conditioning import Labels, LabelsLike, kind_of, numbered, random_rows
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Request
from elit_export.runtime.sampling import StepRecord, sampling_steps
from elit_export.runtime.vae import decoder_input
from elit_export.spec import FUSED, ROWS, DecoderSpec, ModelSpec, Profile, Range, Role

REFERENCE_FILE = "reference.npz"
INPUT_SEED = 20261122
TRAJECTORY_STEPS = 4
GUIDANCE = "cfg:2"
POOL_IMAGES, POOL_STEPS = 8, 8


# ---------------------------------------------------------------- single steps


def reference_cases(profiles: Sequence[Profile]) -> tuple[ReferenceCase, ...]:
    """Every profile at its corners, each once."""
    return tuple(
        ReferenceCase(profile=profile.name, kept=kept, rows=rows, text=text)
        for profile in profiles
        for kept, rows, text in dict.fromkeys(corners(profile))
    )


def corners(profile: Profile) -> Iterator[tuple[int, int, int]]:
    """(K, rows, text) at min, opt and max of all, then at the least of one with the most of the others.

    Not all, because a bundle stores PyTorch's answer to each. `text` is 0 in models without.
    """
    latents, rows = profile.latents, profile.rows
    text = profile.text.corners() if profile.text else (0, 0, 0)
    yield from zip(latents.corners(), rows.corners(), text, strict=True)
    yield latents.min, rows.max, text[2]
    yield latents.max, rows.min, text[0]


def point_of(case: ReferenceCase) -> str:
    """Where in its profile a case is, as messages tell it."""
    text = f" text={case.text}" if case.text else ""
    return f"K={case.kept} rows={case.rows}{text}"


def trajectory_rows(pipeline: Pipeline, text: Range | None) -> Arrays:
    """Inputs of every step of one sampling, by name: images of all classes and none, times from 1 to 1 / POOL_STEPS.

    Of models with text x and t alone; how long text is, differs from case to case.
    """
    spec = pipeline.spec
    labels = (*(image % (spec.num_classes + 1) for image in range(POOL_IMAGES - 1)), spec.null_class)
    conditioning = Labels(labels) if kind_of(spec) is Labels else numbered(spec, range(POOL_IMAGES), text)
    request = pipeline.request(conditioning, steps=POOL_STEPS, sampler="euler", seed=INPUT_SEED)
    states = [request.start, *(record.x for record in sampling_steps(pipeline.bank, request))][:-1]
    classes = {} if text else {name: np.tile(each, POOL_STEPS) for name, each in request.conditioning.items()}
    return {
        "x": np.concatenate(states).astype(np.float32),
        "t": np.repeat(request.times[:-1], POOL_IMAGES).astype(np.float32),
        **classes,
    }


def case_rows(case: ReferenceCase, index: int, pool: Arrays, spec: ModelSpec) -> Arrays:
    """Rows of a pool, each once as far as they reach, with text of the case's length; a function of `index` alone."""
    generator = np.random.default_rng((INPUT_SEED, index))
    chosen = np.resize(generator.permutation(len(pool["t"])), case.rows)
    text = random_rows(spec, case.rows, case.text, generator) if case.text else {}
    return {name: values[chosen] for name, values in pool.items()} | text


def case_inputs(case: ReferenceCase, index: int, spec: ModelSpec) -> Arrays:
    """Noise-like x, t over (0, 1), and labels or text; a function of `index` alone."""
    generator = np.random.default_rng((INPUT_SEED, index))
    return {
        "x": generator.standard_normal((case.rows, *spec.sample_shape)).astype(np.float32),
        "t": generator.uniform(0.02, 1.0, case.rows).astype(np.float32),
        **random_rows(spec, case.rows, max(case.text, 1), generator),
    }


# ---------------------------------------------------------------- graphs of the cache


def cache_rows(profiles: Sequence[Profile]) -> tuple[int, ...]:
    """Least and most usual rows; not the most, because what these graphs take and give is large."""
    return tuple(sorted({min(profile.rows.min for profile in profiles), max(profile.rows.opt for profile in profiles)}))


def cache_inputs(graph: str, rows: int, spec: ModelSpec) -> Arrays:
    """Inputs of one of CACHE_GRAPHS; a function of (graph, rows) alone."""
    generator = np.random.default_rng((INPUT_SEED, len(graph), rows))
    common = case_inputs(ReferenceCase(profile="", kept=1, rows=rows), rows, spec)
    shapes = {tensor.name: (rows, *map(int, tensor.dims[1:])) for tensor in spec.graph(graph).inputs}
    return {
        name: common[name] if name in common else generator.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def fused_inputs(inputs: Arrays, *, force: bool, rows: int, spec: ModelSpec) -> Arrays:
    """Inputs of `fused` that make it compute or reuse whatever it measures; `inputs` take the place of zeros."""
    given = (Role.LATENTS, Role.TEXT, Role.TEXT_MASK)
    zeros = {
        tensor.name: np.zeros([rows if size == ROWS else int(size) for size in tensor.dims], tensor.dtype)
        for tensor in spec.graph(FUSED).inputs
        if tensor.role not in given
    }
    choices = {"threshold": np.inf, "low": -np.inf, "high": np.inf}
    return {
        **zeros,
        **{name: np.array(value, np.float32) for name, value in choices.items()},
        "force": np.array(force),
        "most": np.array(1, np.int64),
        "order": np.array(1, np.int64),
        **inputs,
    }


# ---------------------------------------------------------------- decoder of a VAE


def decoder_rows(rows: Range) -> tuple[int, ...]:
    """Least and most usual rows, or one more where these are the same: what mixes up images shows in no single one.

    Not the most, because pictures are large.
    """
    second = rows.opt if rows.opt > rows.min else min(rows.min + 1, rows.max)
    return tuple(sorted({rows.min, second}))


def decoder_inputs(rows: int, spec: DecoderSpec) -> Arrays:
    """What a decoder takes of latents that are standard normal, about as a model makes them."""
    generator = np.random.default_rng((INPUT_SEED, rows))
    latents = generator.standard_normal((rows, spec.channels, spec.side, spec.side))
    return {"z": decoder_input(latents, spec)}


# ---------------------------------------------------------------- trajectories


def reference_trajectories(profiles: Sequence[Profile], spec: ModelSpec) -> tuple[ReferenceTrajectory, ...]:
    """Short samplings, plain, guided, mixed and multistep, compared step by step.

    Guidance that shares a call takes several rows an image: profiles without room for that are compared
    unguided, and what no number of images fits is left out.
    """
    lowest = min(profile.latents.min for profile in profiles)
    highest = max(profile.latents.max for profile in profiles)
    half = TRAJECTORY_STEPS // 2
    mixed = f"0-{half - 1}:{lowest},{half}-{TRAJECTORY_STEPS - 1}:{highest}"
    guided_images = _image_count(
        profiles, {lowest, highest}, rows_per_image=(1, Guidance.parse(GUIDANCE, spec).rows_per_image(spec.full))
    )
    images = guided_images or _image_count(profiles, {lowest, highest}, rows_per_image=(1,))
    weak = f"ccfg:2@{lowest}" if guided_images else "none"
    wanted = (
        ("plain", str(highest), "none", "euler", images),
        ("guided", str(highest), GUIDANCE, "heun", guided_images),
        ("mixed", mixed, weak, "euler", images),
        ("multistep", mixed, weak, "ab3", images),
    )
    text = profiles[0].text
    return tuple(
        ReferenceTrajectory(
            name=name,
            labels=tuple(range(count))
            if text
            else tuple(image * (spec.num_classes - 1) % spec.num_classes for image in range(count)),
            text=text,
            steps=TRAJECTORY_STEPS,
            schedule=schedule,
            guidance=guidance,
            sampler=sampler,
        )
        for name, schedule, guidance, sampler, count in wanted
        if count
    )


def _image_count(profiles: Sequence[Profile], budgets: set[int], *, rows_per_image: tuple[int, ...]) -> int:
    """Images, as near to two as may be, whose rows some profile takes at every budget; 0 if there is no such number."""

    def fits(images: int) -> bool:
        return all(
            any(kept in profile.latents and images * rows in profile.rows for profile in profiles)
            for kept in budgets
            for rows in rows_per_image
        )

    most = max(profile.rows.max for profile in profiles)
    return next((images for images in sorted(range(1, most + 1), key=lambda n: abs(n - 2)) if fits(images)), 0)


def trajectory_request(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> Request:
    """The sampling, checked against any engines."""
    shown: LabelsLike = trajectory.labels
    if trajectory.text:
        shown = numbered(pipeline.spec, trajectory.labels, trajectory.text)
    return pipeline.request(
        shown,
        steps=trajectory.steps,
        schedule=trajectory.schedule,
        guidance=trajectory.guidance,
        sampler=trajectory.sampler,
        seed=INPUT_SEED,
    )


def trajectory_steps(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> Generator[StepRecord, None, None]:
    """The steps of the sampling."""
    return sampling_steps(pipeline.bank, trajectory_request(pipeline, trajectory))


def trajectory_states(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> list[Float64]:
    """The state after each step."""
    return [record.x for record in trajectory_steps(pipeline, trajectory)]


def trajectory_profiles(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> tuple[str, ...]:
    """The profiles that serve the sampling, in the order of their first call."""
    sizes = trajectory_request(pipeline, trajectory).sizes
    return tuple(dict.fromkeys(pipeline.coverage.profile_for(*size).name for size in sizes))
