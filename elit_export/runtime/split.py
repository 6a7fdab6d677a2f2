"""How a sampling of any number of images is split into parts that the profiles take.

Parts are sampled one after another, each from noise to its last step. So what engines hold between steps, such as the
residuals of the step cache, is that of one part, however many images there are. To take each step for all parts in turn
would hold it for all images, on a GPU in its memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import count, product

from elit_export.errors import InputError
from elit_export.runtime.coverage import CallSize, Coverage, row_limits
from elit_export.spec.limits import IMAGES

NONE = float("inf")  # parts, where there is no split


def split(coverage: Coverage, calls: Sequence[CallSize], images: int, at_once: int | None = None) -> tuple[int, ...]:
    """The images of each part: few parts, and even ones, the larger first.

    `calls` are the sizes of every call of a sampling of one image. A part has at most `at_once` images. Raises
    InputError where no profile runs a call, and where the images cannot be divided into such parts.
    """
    if problem := IMAGES.problem(images, "the number of images"):
        raise InputError(problem, "sample them in several runs, each with its own first_image")
    fitting = _fitting(coverage, calls, at_once or int(IMAGES.maximum))
    if sizes := _divided(images, fitting):
        return sizes
    limits = "; ".join(
        f"an image is {rows} rows at budget {budget}: profile {row_limits(coverage.profiles_for(budget, text))}"
        for budget, rows, text in calls
    )
    most = f" of at most {at_once}" if at_once else ""
    raise InputError(f"{images} images cannot be split into parts{most}: {limits}", _remedy(images, fitting))


def _remedy(images: int, fitting: Sequence[range]) -> str:
    if not fitting:
        return "choose guidance of fewer rows an image, more images at once, or build with other `rows`"
    largest = _largest(fitting)
    whole = _whole(images, largest)
    fewest = _fewest_parts(images - whole * largest + largest, fitting)  # as far as the next multiple of the largest
    enough = next(total for total in count(images - whole * largest + 1) if fewest[total] < NONE)
    return f"sample {whole * largest + enough} images, or build with other `rows`"


def _fitting(coverage: Coverage, calls: Sequence[CallSize], most: int) -> list[range]:
    """The numbers of images, up to `most`, for which every call has a profile."""
    fitting = [range(1, most + 1)]
    for budget, rows, text in calls:
        taken = (profile.rows for profile in coverage.profiles_for(budget, text))
        images = [range(-(-each.min // rows), each.max // rows + 1) for each in taken]
        both = (range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in product(fitting, images))
        fitting = [numbers for numbers in dict.fromkeys(both) if numbers]
    return fitting


def _divided(images: int, fitting: Sequence[range]) -> tuple[int, ...]:
    """Even parts; else, where the sizes have gaps, the fewest parts that there are; else none."""
    if not fitting:
        return ()
    if sizes := _even(images, fitting):
        return sizes
    largest = _largest(fitting)
    parts = [largest] * _whole(images, largest)
    return _of_fewest(images - sum(parts), fitting, parts)


def _of_fewest(left: int, fitting: Sequence[range], parts: list[int]) -> tuple[int, ...]:
    """`parts`, and what is left in the fewest, each as near the mean of the rest as it can be; else none."""
    fewest = _fewest_parts(left, fitting)
    if fewest[left] == NONE:
        return ()
    while left:
        number = fewest[left]
        sizes = [size for fits in fitting for size in fits if size <= left and fewest[left - size] == number - 1]
        parts.append(min(sizes, key=partial(_from_mean, left, number)))
        left -= parts[-1]
    return tuple(sorted(parts, reverse=True))


def _from_mean(images: int, parts: float, size: int) -> float:
    return abs(size * parts - images)


def _largest(fitting: Sequence[range]) -> int:
    return max(sizes[-1] for sizes in fitting)


def _whole(images: int, largest: int) -> int:
    """How many parts of the largest size some split into the fewest parts has, whatever the other sizes are.

    Among `largest` other parts, some add up to a multiple of it, and parts of the largest size are not more.
    """
    return max(0, images // largest - largest)


def _fewest_parts(most: int, fitting: Sequence[range]) -> list[float]:
    """For each number of images up to `most` the fewest parts, NONE where it cannot be divided.

    Each range has a window that slides over what its parts leave; only what may yet be the least is kept in it.
    """
    fewest: list[float] = [0]
    windows: list[deque[int]] = [deque() for _ in fitting]
    for images in range(1, most + 1):
        for sizes, window in zip(fitting, windows, strict=True):
            if (left := images - sizes.start) >= 0:
                while window and fewest[window[-1]] >= fewest[left]:
                    window.pop()
                window.append(left)
            if window and window[0] < images - sizes[-1]:
                window.popleft()
        fewest.append(min((fewest[window[0]] + 1 for window in windows if window), default=NONE))
    return fewest


def _even(images: int, fitting: Sequence[range]) -> tuple[int, ...]:
    """Return as few parts as the largest size allows, which differ by one at most; none where these do not fit."""
    largest = max((min(sizes[-1], images) for sizes in fitting if sizes.start <= images), default=0)
    if not largest:
        return ()
    parts = -(-images // largest)
    small, larger = divmod(images, parts)
    sizes = (small + 1,) * larger + (small,) * (parts - larger)
    return sizes if all(any(size in numbers for numbers in fitting) for size in {*sizes}) else ()
