"""HunyuanImage: words in quotation marks go to a text encoder of their own."""

from __future__ import annotations

import pytest
import torch

from tests.training.base.test_memory import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from training.base.frozen import load_frozen


@pytest.mark.skipif("hunyuan-image" not in TRAINED, reason="needs a diffusers that knows it")
def test_padding_that_is_left_out_changes_nothing(folders: Folders) -> None:
    config = config_of("hunyuan-image", folders("hunyuan-image"), llm_max_token_length=24)
    frozen = load_frozen(config)
    captions = ['a picture of "red cat"', "a green dog"]
    with torch.no_grad():
        given = frozen.family.encode_text(frozen.encoders, captions, config)
        noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0])
        found = frozen.family.predict(frozen.model, noisy, t, given)
        whole = frozen.model(
            noisy, t, given["prompt"], given["mask"], None, given["glyphs"], given["glyph_mask"]
        ).sample
    assert given["glyph_mask"].sum(dim=1).tolist() == [7, 0]  # of: Text "red cat".
    assert torch.allclose(found, whole, atol=1e-5)
    plain = given | {"glyph_mask": torch.zeros_like(given["glyph_mask"])}
    with torch.no_grad():
        without = frozen.family.predict(frozen.model, noisy, t, plain)
    assert not torch.allclose(without[0], whole[0], atol=1e-4)
    assert torch.allclose(without[1], whole[1], atol=1e-5)
