"""How a sampling of any number of images is split into parts that the profiles take.

Parts are sampled one after another, each from noise to its last step. So what engines hold between steps, such as the
residuals of the step cache, is that of one part, however many images there are. To take each step for all parts in turn
would hold it for all images, on a GPU in its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, product

from elit_export.errors import InputError
from elit_export.runtime.coverage import CallSize, Coverage, row_limits
from elit_export.spec.limits import IMAGES


def split(coverage: Coverage, calls: Sequence[CallSize], images: int, at_once: int | None = None) -> tuple[int, ...]:
    """The images of each part: few parts, and even ones, the larger first.

    `calls` are the sizes of every call of a sampling of one image. A part has at most `at_once` images. Raises
    InputError where no profile runs a call, and where the images cannot be divided into such parts.
    """
    if problem := IMAGES.problem(images, "the number of images"):
        raise InputError(problem, "sample them in several runs, each with its own first_image")
    fitting = _fitting(coverage, calls, at_once or int(IMAGES.most))
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
    enough = next(number for number in count(images + 1) if _divided(number, fitting))
    return f"sample {enough} images, or build with other `rows`"


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
    """Even parts; else, where the sizes have gaps, parts of the largest size and the rest in even ones; else none."""
    if sizes := _even(images, fitting):
        return sizes
    largest = max((sizes[-1] for sizes in fitting), default=images + 1)
    whole = images // largest
    for number in range(whole, max(0, whole - largest), -1):  # with more in the rest, some of it were the largest again
        if rest := _even(images - number * largest, fitting):
            return (largest,) * number + rest
    return ()


def _even(images: int, fitting: Sequence[range]) -> tuple[int, ...]:
    """As few parts as the largest size allows, which differ by one at most; none where these do not fit."""
    largest = max((min(sizes[-1], images) for sizes in fitting if sizes.start <= images), default=0)
    if not largest:
        return ()
    parts = -(-images // largest)
    small, larger = divmod(images, parts)
    sizes = (small + 1,) * larger + (small,) * (parts - larger)
    return sizes if all(any(size in numbers for numbers in fitting) for size in {*sizes}) else ()
