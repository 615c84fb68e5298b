"""Measures of generated images against reference images, all from features extracted once.

FID and sFID are in `frechet.py`. What cannot be computed says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dmp_common import PatchError
from training.evaluation.features import Features
from training.objective.frechet import Gaussian

METRICS = (
    "distance_to_full", "feature_distance_to_full", "fid", "sfid", "kid", "precision", "recall",
    "class_accuracy", "clip_score",
)  # fmt: skip
HIGHER_IS_BETTER = ("precision", "recall", "class_accuracy", "clip_score")
NEIGHBOURS = 3  # Kynkaanniemi et al. 2019
_ROWS = 1024  # of a matrix of distances at a time


@dataclass
class Measured:
    """The metrics of one model's samples.

    Args:
        values: by name; "kid_std" beside "kid".
        single: of measures that are means: the value of each sample (of recall: of each reference
            image), by name.
    """

    values: dict[str, float] = field(default_factory=dict)
    single: dict[str, Tensor] = field(default_factory=dict)


class Reference:
    """Reference images, and what of it can be prepared once.

    Args:
        features: of the reference images.
        wanted: names of metrics; the CLIP score needs no reference.
        samples: how many will be generated.
        subsets, subset_size: of KID.

    Attributes:
        impossible: why, for each wanted metric that cannot be computed.
    """

    def __init__(
        self,
        features: Features,
        wanted: Sequence[str],
        samples: int,
        *,
        subsets: int = 100,
        subset_size: int = 1000,
    ) -> None:
        self.features, self.subsets, self.subset_size = features, subsets, subset_size
        few = min(len(features), samples)
        why = {
            "fid": few < 2 and "fewer than two images",
            "sfid": (few < 2 and "fewer than two images")
            or (features.spatial is None and "the feature extractor gives no feature map"),
            "kid": few < subset_size
            and f"subsets of {subset_size} images need as many, found {few}: give more --samples "
            "and reference images, or a smaller --kid_subset_size",
            **dict.fromkeys(
                ("precision", "recall"),
                few <= NEIGHBOURS and f"{NEIGHBOURS} neighbours need more images, found {few}",
            ),
        }
        asked = [name for name in wanted if name in why]
        self.impossible = {name: str(why[name]) for name in asked if why[name]}
        self.wanted = [name for name in asked if not why[name]]
        self.pooled = Gaussian(features.pooled, "the reference") if "fid" in self.wanted else None
        self.spatial: Gaussian | None = None
        if "sfid" in self.wanted and features.spatial is not None:
            self.spatial = Gaussian(features.spatial, "the reference")

    def measure(self, features: Features, seed: int = 0) -> Measured:
        """Everything wanted but the CLIP score.

        Args:
            seed: of KID's subsets.
        """
        found = Measured()
        if self.pooled is not None:
            found.values["fid"] = self.pooled.distance(features.pooled, "the samples")
        if self.spatial is not None and features.spatial is not None:
            found.values["sfid"] = self.spatial.distance(features.spatial, "the samples")
        if "kid" in self.wanted:
            mean, std = kid(
                features.pooled, self.features.pooled, self.subsets, self.subset_size, seed
            )
            found.values |= {"kid": mean, "kid_std": std}
        real = self.features.pooled
        for name, of, among in (
            ("precision", features.pooled, real),
            ("recall", real, features.pooled),
        ):
            if name in self.wanted:
                inside = within(of, among).double()
                found.single[name] = inside
                found.values[name] = float(inside.mean())
        return found


def kid(
    generated: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance of features (N, F) and (M, F): mean and deviation over random subsets.

    Computed by torchmetrics. Its subsets are drawn from torch's global generator, which is seeded
    here and put back.

    Raises:
        PatchError: torchmetrics is not installed.

    Source: Binkowski et al. 2018.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise PatchError(
            "expected the package torchmetrics for KID, found none: pip install torchmetrics, or "
            "leave kid out of --metrics."
        ) from error
    with warnings.catch_warnings():
        # It keeps all features, which are in memory here anyway.
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")
        metric = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=subset_size)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def within(features: Tensor, among: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Which features (N, F) lie within the manifold of others (M, F): (N,), bool.

    The manifold is the union of balls around the others, each reaching to its k-th neighbour.
    Precision is the mean over generated images among reference images, recall the mean over
    reference images among generated ones. torch-fidelity gives these means alone; the intervals
    of paired differences need each image's.

    Source: Kynkaanniemi et al. 2019, eqs. 1-2.
    """
    among = among.double()
    radius = torch.cat(
        [
            # The nearest is the point itself.
            torch.cdist(rows, among).topk(neighbours + 1, largest=False).values[:, -1]
            for rows in among.split(_ROWS)
        ]
    )
    parts = [(torch.cdist(rows, among) <= radius).any(1) for rows in features.double().split(_ROWS)]
    return torch.cat(parts)
