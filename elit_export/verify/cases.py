"""The inputs on which engines are compared: single steps at every profile's corners, and short trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from elit_export.arrays import Arrays, Float64
from elit_export.bundle.manifest import ReferenceCase, ReferenceTrajectory
from elit_export.runtime.conditioning import Labels, LabelsLike, kind_of, numbered, random_rows
from elit_export.runtime.guidance import Guidance
from elit_export.runtime.pipeline import Pipeline
from elit_export.runtime.request import Request
from elit_export.runtime.sampling import StepRecord, sampling_steps, whole_steps
from elit_export.runtime.vae import decoder_input
from elit_export.spec import FUSED, ROWS, DecoderSpec, ModelSpec, Profile, Range, Role

INPUT_SEED = 20261122
TRAJECTORY_STEPS = 4
GUIDANCE = "cfg:2"
POOL_IMAGES, POOL_STEPS = 8, 8


# ---------------------------------------------------------------- single steps


def reference_cases(profiles: Sequence[Profile]) -> tuple[ReferenceCase, ...]:
    """List the corners of every profile, each once."""
    return tuple(
        ReferenceCase(profile=profile.name, kept=kept, rows=rows, text=text)
        for profile in profiles
        for kept, rows, text in dict.fromkeys(corners(profile))
    )


def corners(profile: Profile) -> Iterator[tuple[int, int, int]]:
    """Yield (K, rows, text) at min, opt and max of all ranges, then at the min of one with the max of the others.

    Not all combinations, because a bundle stores PyTorch's outputs for each. `text` is 0 in models without text.
    """
    latents, rows = profile.latents, profile.rows
    text = profile.text.corners() if profile.text else (0, 0, 0)
    yield from zip(latents.corners(), rows.corners(), text, strict=True)
    yield latents.min, rows.max, text[2]
    yield latents.max, rows.min, text[0]


def case_point(case: ReferenceCase) -> str:
    """Write the position of a case in its profile, for messages."""
    text = f" text={case.text}" if case.text else ""
    return f"K={case.kept} rows={case.rows}{text}"


def trajectory_rows(pipeline: Pipeline, text: Range | None) -> Arrays:
    """Collect the inputs of every step of one sampling by name, with all classes and the null class.

    t falls from 1 to 1 / POOL_STEPS. For models with text the inputs are x and t alone, because the length of text
    differs between cases.
    """
    spec = pipeline.spec
    labels = (*(image % (spec.num_classes + 1) for image in range(POOL_IMAGES - 1)), spec.null_class)
    conditioning = Labels(labels) if kind_of(spec) is Labels else numbered(spec, range(POOL_IMAGES), text)
    request = pipeline.request(conditioning, steps=POOL_STEPS, sampler="euler", seed=INPUT_SEED)
    steps = whole_steps(request, sampling_steps(pipeline.bank, request))
    states = [request.start, *(record.x for record in steps)][:-1]
    labels_by_row = {} if text else {name: np.tile(values, POOL_STEPS) for name, values in request.conditioning.items()}
    return {
        "x": np.concatenate(states).astype(np.float32),
        "t": np.repeat(request.times[:-1], POOL_IMAGES).astype(np.float32),
        **labels_by_row,
    }


def case_rows(case: ReferenceCase, index: int, pool: Arrays, spec: ModelSpec) -> Arrays:
    """Draw rows of a pool, with text of the case's length; a function of `index` alone.

    No row is repeated before all are used.
    """
    generator = np.random.default_rng((INPUT_SEED, index))
    indices = np.resize(generator.permutation(len(pool["t"])), case.rows)
    text = random_rows(spec, case.rows, case.text, generator) if case.text else {}
    return {name: values[indices] for name, values in pool.items()} | text


def case_inputs(case: ReferenceCase, index: int, spec: ModelSpec) -> Arrays:
    """Draw normal x, t over (0, 1), and labels or text; a function of `index` alone."""
    generator = np.random.default_rng((INPUT_SEED, index))
    return {
        "x": generator.standard_normal((case.rows, *spec.sample_shape)).astype(np.float32),
        "t": generator.uniform(0.02, 1.0, case.rows).astype(np.float32),
        **random_rows(spec, case.rows, max(case.text, 1), generator),
    }


# ---------------------------------------------------------------- graphs of the cache


def cache_rows(profiles: Sequence[Profile]) -> tuple[int, ...]:
    """The smallest min and the largest opt of the profiles' rows; not the max, because these tensors are large."""
    return tuple(sorted({min(profile.rows.min for profile in profiles), max(profile.rows.opt for profile in profiles)}))


def cache_inputs(graph: str, rows: int, spec: ModelSpec) -> Arrays:
    """Draw inputs of one of CACHE_GRAPHS; a function of (graph, rows) alone."""
    generator = np.random.default_rng((INPUT_SEED, len(graph), rows))
    shared = case_inputs(ReferenceCase(profile="", kept=1, rows=rows), rows, spec)
    shapes = {tensor.name: (rows, *map(int, tensor.dims[1:])) for tensor in spec.graph(graph).inputs}
    return {
        name: shared[name] if name in shared else generator.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def fused_inputs(inputs: Arrays, *, force: bool, rows: int, spec: ModelSpec) -> Arrays:
    """Make inputs of `fused` that force it to compute or to reuse; `inputs` replace zeros."""
    provided = (Role.LATENTS, Role.TEXT, Role.TEXT_MASK)
    zeros = {
        tensor.name: np.zeros([rows if size == ROWS else int(size) for size in tensor.dims], tensor.dtype)
        for tensor in spec.graph(FUSED).inputs
        if tensor.role not in provided
    }
    thresholds = {"threshold": np.inf, "low": -np.inf, "high": np.inf}
    return {
        **zeros,
        **{name: np.array(value, np.float32) for name, value in thresholds.items()},
        "force": np.array(force),
        "most": np.array(1, np.int64),
        "order": np.array(1, np.int64),
        **inputs,
    }


# ---------------------------------------------------------------- decoder of a VAE


def decoder_rows(rows: Range) -> tuple[int, ...]:
    """The min and opt of the rows, or min and one more where they are equal: one row cannot show mixed-up images.

    Not the max, because pictures are large.
    """
    second = rows.opt if rows.opt > rows.min else min(rows.min + 1, rows.max)
    return tuple(sorted({rows.min, second}))


def decoder_inputs(rows: int, spec: DecoderSpec) -> Arrays:
    """Make a decoder's inputs from standard normal latents, which are close to those of a model."""
    generator = np.random.default_rng((INPUT_SEED, rows))
    latents = generator.standard_normal((rows, spec.channels, spec.side, spec.side))
    return {"z": decoder_input(latents, spec)}


# ---------------------------------------------------------------- trajectories


def reference_trajectories(profiles: Sequence[Profile], spec: ModelSpec) -> tuple[ReferenceTrajectory, ...]:
    """List short samplings that are compared step by step: plain, guided, mixed budgets, multistep.

    Guidance that shares a call needs several rows per image. Profiles without room for them are compared unguided, and
    samplings that fit no number of images are left out.
    """
    min_kept = min(profile.latents.min for profile in profiles)
    max_kept = max(profile.latents.max for profile in profiles)
    half = TRAJECTORY_STEPS // 2
    mixed = f"0-{half - 1}:{min_kept},{half}-{TRAJECTORY_STEPS - 1}:{max_kept}"
    guided_images = _image_count(
        profiles, {min_kept, max_kept}, rows_per_image=(1, Guidance.parse(GUIDANCE, spec).rows_per_image(spec.full))
    )
    images = guided_images or _image_count(profiles, {min_kept, max_kept}, rows_per_image=(1,))
    weak = f"ccfg:2@{min_kept}" if guided_images else "none"
    variants = (
        ("plain", str(max_kept), "none", "euler", images),
        ("guided", str(max_kept), GUIDANCE, "heun", guided_images),
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
        for name, schedule, guidance, sampler, count in variants
        if count
    )


def _image_count(profiles: Sequence[Profile], budgets: set[int], *, rows_per_image: tuple[int, ...]) -> int:
    """The number of images nearest to two whose rows some profile takes at every budget; 0 if there is none."""

    def fits(images: int) -> bool:
        return all(
            any(kept in profile.latents and images * rows in profile.rows for profile in profiles)
            for kept in budgets
            for rows in rows_per_image
        )

    max_rows = max(profile.rows.max for profile in profiles)
    return next((images for images in sorted(range(1, max_rows + 1), key=lambda n: abs(n - 2)) if fits(images)), 0)


def trajectory_request(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> Request:
    """Make the checked request of a reference trajectory."""
    conditioning: LabelsLike = trajectory.labels
    if trajectory.text:
        conditioning = numbered(pipeline.spec, trajectory.labels, trajectory.text)
    return pipeline.request(
        conditioning,
        steps=trajectory.steps,
        schedule=trajectory.schedule,
        guidance=trajectory.guidance,
        sampler=trajectory.sampler,
        seed=INPUT_SEED,
    )


def trajectory_steps(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> Iterator[StepRecord]:
    """Run the steps of a reference trajectory, each of all images."""
    request = trajectory_request(pipeline, trajectory)
    return whole_steps(request, sampling_steps(pipeline.bank, request))


def trajectory_states(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> list[Float64]:
    """Run a reference trajectory; returns the state after each step."""
    return [record.x for record in trajectory_steps(pipeline, trajectory)]


def trajectory_profiles(pipeline: Pipeline, trajectory: ReferenceTrajectory) -> tuple[str, ...]:
    """The profiles that serve a reference trajectory, in the order of their first call."""
    sizes = trajectory_request(pipeline, trajectory).sizes()
    return tuple(dict.fromkeys(pipeline.coverage.profile_for(*size).name for size in sizes))
