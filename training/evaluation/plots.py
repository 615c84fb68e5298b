"""The two pictures of an evaluation: the loss by timestep, and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from dmp_common import PatchError
from training.evaluation.comparison import Difference
from training.evaluation.differences import Judged
from training.objective.pictures import as_image

_SMALLEST = 64  # pixels of a side in the grid of samples


def plot_losses(
    judged: Mapping[str, Judged], reference: str, differences: Sequence[Difference], path: Path
) -> None:
    """The loss by timestep, and below its difference to the base with intervals over images.

    Args:
        judged: by label.
        reference: the label of the base, which the others are subtracted from.

    Raises:
        PatchError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PatchError(
            "expected the package matplotlib for loss_by_bin.png, found none: pip install "
            "matplotlib; the figures themselves are written."
        ) from error
    base = judged[reference].losses.mean(0).tolist()
    bins = len(base)
    middles = [1000 * (number + 0.5) / bins for number in range(bins)]
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for label, found in judged.items():
        above.plot(middles, found.losses.mean(0).tolist(), marker="o", label=label)
    above.set_yscale("log")
    above.set_ylabel("held-out loss")
    above.legend()
    below.axhline(0, color="grey", linewidth=1)
    for label in judged:
        if label == reference:
            below.plot([], [])  # its colour
            continue
        of_bins = [
            one
            for one in differences
            if one.model == label
            and one.against == reference
            and one.measure.startswith("loss_bin_")
        ]
        means = [100 * one.mean / loss for one, loss in zip(of_bins, base, strict=True)]
        # The interval is symmetric: it is Student's.
        reach = [
            100 * (one.high - one.mean) / loss for one, loss in zip(of_bins, base, strict=True)
        ]
        below.errorbar(middles, means, yerr=reach, marker="o", capsize=3, label=label)
    below.set_ylabel("difference to the base, % of its loss\n(95 % intervals over images)")
    below.set_xlabel("timestep (0 is the picture)")
    figure.savefig(path, dpi=120)


def sample_grid(columns: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Rows of pictures from equal noise, one column a model, the base first.

    Args:
        columns: pictures (C, H, W) in [-1, 1]; those of another size than the first are left out.
    """
    shape = columns[0][0].shape
    factor = max(1, _SMALLEST // shape[1])
    rows = [row for row in zip(*columns, strict=True) if row[0].shape == shape]
    gap = max(1, factor * shape[1] // 16)
    cells = []
    for row in rows:
        large = [p.repeat_interleave(factor, 1).repeat_interleave(factor, 2) for p in row]
        framed = [nn.functional.pad(p, (gap,) * 4, value=1.0) for p in large]
        cells.append(torch.cat(framed, dim=2))
    return as_image(torch.cat(cells, dim=1))
