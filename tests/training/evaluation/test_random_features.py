"""Features that chose nothing: the same everywhere, for pictures of any size."""

from __future__ import annotations

import pytest
import torch

from dmp_common import PatchError
from training.evaluation.features import load_extractor
from training.evaluation.random_features import random_features


def test_values_are_the_same_everywhere() -> None:
    images = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    state = torch.get_rng_state()
    found = random_features()(images)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = torch.tensor([0.4402525722980499, 1.2390086650848389, 0.8924292325973511])
    torch.testing.assert_close(found[0, :3], wanted, atol=1e-5, rtol=1e-5)


def test_any_size_as_extractor_by_name() -> None:
    extractor = load_extractor(
        "digits", chosen="training.evaluation.random_features:random_features"
    )
    assert extractor is not None
    for shape in ((2, 1, 8, 8), (2, 3, 40, 64), (2, 1, 8, 12)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        features = extractor(images).pooled
        assert features.shape == (2, 64) and features.dtype == torch.float32
        assert not torch.allclose(features[0], features[1])
    grey = torch.rand(1, 1, 16, 16)
    assert torch.equal(extractor(grey).pooled, extractor(grey.expand(1, 3, 16, 16)).pooled)
    with pytest.raises(PatchError, match=r"expected images \(B, 1 or 3, H, W\) of 8 x 8 or more"):
        extractor(torch.zeros(2, 2, 8, 8))
