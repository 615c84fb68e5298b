"""Frechet distances between sets of features, exact and in float64: FID and sFID."""

from __future__ import annotations

import torch
from torch import Tensor


class Gaussian:
    """A Gaussian fitted to features (N, F): one side of many Frechet distances.

    Args:
        features: (N, F), those of the reference images.
        name: the features' name in errors.

    Raises:
        ValueError: not (N, F), fewer than two samples, or values that are not finite.
    """

    def __init__(self, features: Tensor, name: str = "features") -> None:
        self.mean, centred = _centred(features, name)
        covariance = centred.T @ centred / (len(centred) - 1)
        values, vectors = torch.linalg.eigh(covariance)
        # Rounding makes zero eigenvalues slightly negative; their root would be NaN.
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._trace = covariance.trace()

    def distance(self, features: Tensor, name: str = "features") -> float:
        """Frechet distance to the Gaussian fitted to other features (M, F).

        |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), unbiased covariances. The
        root's trace is taken from the eigenvalues of a symmetric product, so it stays real where
        C_a C_b is singular or ill-conditioned.

        Raises:
            ValueError: features of another width, too few, or not finite.

        Source: Heusel et al. 2017; Dowson and Landau 1982.
        """
        mean, centred = _centred(features, name)
        if mean.shape != self.mean.shape:
            raise ValueError(
                "expected feature sets of one width, found "
                f"{self.mean.shape[0]} and {mean.shape[0]}"
            )
        centred = centred / (len(centred) - 1) ** 0.5
        mixed = centred @ self._root
        # Y^T Y and Y Y^T have the same eigenvalues besides zeros: take the smaller.
        few = len(mixed) < mixed.shape[1]
        product = mixed @ mixed.T if few else mixed.T @ mixed
        overlap = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
        traces = self._trace + centred.square().sum()
        distance = (mean - self.mean).square().sum() + traces - 2 * overlap
        return max(float(distance), 0.0)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two feature sets (A, F) and (B, F).

    Raises:
        ValueError: not two (samples, F) matrices, fewer than two samples, or non-finite values.

    Source: see `Gaussian.distance`.
    """
    return Gaussian(features_a, "features_a").distance(features_b, "features_b")


def fid(generated: Tensor, reference: Tensor) -> float:
    """Frechet distance of pooled features (N, F); with Inception's 2048 it is FID.

    Raises:
        ValueError: see `frechet_distance`.

    Source: Heusel et al. 2017.
    """
    return frechet_distance(reference, generated)


def sfid(generated: Tensor, reference: Tensor) -> float:
    """Frechet distance of spatial features (N, 2023), see `features.spatial_features`.

    Raises:
        ValueError: see `frechet_distance`.

    Source: Nash et al. 2021, section 5.
    """
    return frechet_distance(reference, generated)


def _centred(features: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean (F,) of features (samples, F), and their distances from it, in float64."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"expected {name} as (samples, F), found {tuple(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"expected at least 2 samples in {name}, found {len(features)}")
    features = features.detach().cpu().double()
    if not torch.isfinite(features).all():
        raise ValueError(f"expected finite values in {name}, found NaN or infinity")
    mean = features.mean(0)
    return mean, features - mean
