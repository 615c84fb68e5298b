"""Which images are kept for validation: by a hash of their keys, so that no other image matters."""

from __future__ import annotations

from collections.abc import Sequence

from dmp_common import PatchError
from training.data import draws
from training.data.samples import Sample


def validation_rank(key: str, seed: int | None) -> float:
    """A number in [0, 1): images with the smallest ones are kept for validation.

    Args:
        key: of the image.
        seed: another choice of images; None for the usual one.
    """
    return draws.uniform("validation", key) if seed is None else draws.uniform(
        "validation", seed, key
    )  # fmt: skip


def split_samples(samples: Sequence[Sample], validation: bool) -> tuple[list[Sample], int]:
    """The images of training or of validation, and how many are in neither.

    Each data set is split by its own share. An image of several data sets that one of them keeps
    for validation is trained by none of them.

    Raises:
        PatchError: a single image cannot be split.
    """
    chosen = _chosen(samples)
    if validation:
        return [s for s, held in zip(samples, chosen, strict=True) if held], 0
    held_out = {s.origin or s.key for s, held in zip(samples, chosen, strict=True) if held}
    free = [s for s, held in zip(samples, chosen, strict=True) if not held]
    left = [s for s in free if (s.origin or s.key) not in held_out]
    return left, len(free) - len(left)


def _chosen(samples: Sequence[Sample]) -> list[bool]:
    """Whether each image is kept for validation.

    A split that would leave no image to one side gives it the one nearest to the border.
    """
    groups: dict[tuple[float, int | None], list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(sample.subset.validation, []).append(number)
    chosen = [False] * len(samples)
    for (share, seed), members in groups.items():
        if not share:
            continue
        ranks = [validation_rank(samples[n].origin or samples[n].key, seed) for n in members]
        ordered = sorted(set(ranks))
        if len(ordered) < 2:
            raise PatchError(
                "expected two images to split, found one: leave out --validation_split, or "
                "validation_split of that data set."
            )
        border = min(max(share, ordered[1]), ordered[-1])
        for number, rank in zip(members, ranks, strict=True):
            chosen[number] = rank < border
    return chosen
