"""The bundled digits as data of the trainer: no folder, one size, labels."""

from __future__ import annotations

from dmp_common import PatchError
from training.data.kind import DataKind
from training.data.rules import make_subset, values_of
from training.data.samples import Sample, TensorStore
from training.data.skips import Skips
from training.data.sources.digits_images import SplitName, load_digits_split
from training.data.sources.found import Found
from training.options.data_options import DataOptions

DIGITS = "digits"  # the name of the data set, as of the base
KIND = DataKind("label", channels=1, resolution=8, multiple=1, num_classes=10, null_label=10,
                square=True)  # fmt: skip


def find_digits(options: DataOptions, kind: DataKind, split: SplitName) -> Found:
    """The digits of a split; scikit-learn brings them.

    Raises:
        PatchError: the base takes something else, or an option makes no sense for digits.
    """
    if (kind.conditioning, kind.channels, kind.resolution) != ("label", 1, 8):
        raise PatchError(
            "expected a base for grey 8 x 8 images with labels for the digits, found one that "
            f"takes {kind.resolution} x {kind.resolution} with {kind.channels} channels and "
            f"conditioning {kind.conditioning}: choose other data, or --base digits."
        )
    wrong = [n for n in ("flip_aug", "random_crop", "color_aug", "cache_latents",
                         "cache_latents_to_disk", "validation_split", "resolution", "alpha_mask",
                         "verify_images")
             if getattr(options, n)]  # fmt: skip
    if wrong:
        raise PatchError(
            f"expected no --{wrong[0]} with the digits, found it: leave it out; a mirrored "
            "digit is no digit, and the images and their split are fixed."
        )
    subset = make_subset(values_of(options), kind, "digits")
    digits = load_digits_split(split)
    samples = [
        Sample(f"digits/{split}/{row:04d}", row, (8, 8), subset, label=label)
        for row, label in enumerate(digits.labels.tolist())
    ]
    classes = [str(digit) for digit in range(10)]
    return Found(
        "digits of scikit-learn", TensorStore(digits.images), Skips(options), samples,
        classes=classes,
    )  # fmt: skip
