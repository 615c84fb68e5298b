"""The model card: front matter the hub reads, and text from a file that stays text."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from dmp_common import Variant, bases, register_base
from dmp_common.bases.table import known_bases
from dmp_common.tools.card import LICENSES, model_card

BASE = register_base(
    bases.dit("card-dit/2", depth=2, width=8, patch_size=2, grid=(2, 2), hub_id="someone/card-dit")
)


def test_card_says_what_it_is_and_how_to_use_it() -> None:
    metadata = {"ss_steps": "100", "ss_note": "a|b\n<i>c", "modelspec.author": "Me"}
    card = model_card(
        Variant.create(BASE),
        metadata,
        repo_id="me/nice",
        filename="nice.safetensors",
        tags=["cats", "dmp"],
        pictures={"A [cat]": "pictures/cat 1.png"},
    )
    data = ModelCard(card).data.to_dict()
    assert data == {
        "library_name": "diffusion-model-patching",
        "base_model": "someone/card-dit",
        "base_model_relation": "adapter",
        "tags": ["diffusion-model-patching", "dmp", "card-dit/2", "cats"],
    }
    # Two pools of 4 prompts of 8 channels, and a gate of 4 x (8 + 1) weights and 4 biases.
    assert "104 parameters" in card
    assert 'dmp.Patch.load("me/nice", filename="nice.safetensors")' in card
    for words in ("`models/dmp`", "`models/DMP`", "| gate | linear, soft, distinct across depth |"):
        assert words in card
    assert "| prompts of a site | 2 x 2 |" in card
    assert "| acts at timesteps | 0 to 1000 |" in card
    assert r"| ss\_steps | 100 |" in card
    assert r"| ss\_note | a\|b &lt;i&gt;c |" in card  # a file's text cannot leave its cell
    assert "| modelspec.author | Me |" in card
    assert r"![A \[cat\]](pictures/cat%201.png)" in card


def test_card_of_other_variants_and_metadata() -> None:
    variant = Variant.create(BASE, mix="prepend", sites=1)
    metadata = {"ss_long": "x" * 10_000, "modelspec.thumbnail": "data:", "format": "pt"}
    card = model_card(
        variant, metadata, repo_id="me/x", filename="x.safetensors", base_model="a/b: c\n#"
    )
    assert ModelCard(card).data.to_dict()["base_model"] == "a/b: c\n#"  # quoted, so no YAML
    assert "no host takes them" in card
    assert "models/dmp" not in card
    assert "| prompts of a site | 50 |" in card
    assert len(card) < 3000
    assert "thumbnail" not in card
    assert "## Metadata" not in model_card(variant, {}, repo_id="me/x", filename="x.safetensors")


def test_text_of_a_file_means_nothing_in_the_card() -> None:
    metadata = {
        "ss_html": "<script>x</script>",
        "ss_link": "[x](javascript:alert(1)) https://evil.example www.evil.example me@evil.example",
        "ss_hidden": "\u202etxt\u200b\x1b[31m",
        "ss_`code`|": "# heading",
    }
    variant = Variant.create(BASE, sites=1)
    card = model_card(variant, metadata, repo_id="me/x", filename="a`b\n.safetensors")
    table = card.partition("## Metadata")[2]
    assert "<" not in table
    assert "https:" not in table
    assert "www." not in table
    assert "me@" not in table
    assert r"\[x\]\(javascript\:alert\(1\)\)" in table
    assert table.replace("\n", "").isprintable()
    assert table.strip().count("\n") == 5  # a head, a line below it, and four rows
    assert "put `a'b\\n.safetensors` into" in card


def told(**changes: object) -> str:
    level = {"mean": -0.01, "low": -0.02, "high": 0.001}
    verdict = {"images": 64, "change": level, "change_by_noise_level": [level] * 2}
    return json.dumps({**verdict, "verdict": "better than the base", **changes})


def test_card_has_the_verdict_of_the_training() -> None:
    card = model_card(
        Variant.create(BASE), {"ss_dmp_verdict": told()}, repo_id="me/x", filename="x.safetensors"
    )
    assert "On 64 held-out images" in card
    assert r"The loss changed by -1.000 % \(-2.000 to +0.100\)" in card
    assert "| 500 to 1000 | -1.000" in card
    assert "ss_dmp" not in card.replace("\\", "")


def test_card_tells_what_a_repair_is_compared_with() -> None:
    entry = told(share_repaired={}, verdict="90.2% of the gap to the exact call is repaired")
    card = model_card(
        Variant.create(BASE), {"ss_dmp_verdict": entry}, repo_id="me/x", filename="x.safetensors"
    )
    assert "beside the cheap call as it is" in card
    assert "The squared distance to the exact prediction changed by -1.000 %" in card


def test_card_names_the_license_of_the_usual_base() -> None:
    given = {"repo_id": "me/x", "filename": "x.safetensors"}
    assert set(LICENSES) <= {base.hub_id for base in known_bases()}
    card = model_card(Variant.create("sdxl"), {}, **given)
    assert "License of the base: openrail++." in card
    other = model_card(Variant.create("sdxl"), {}, base_model="me/finetune", **given)
    assert "License of the base" not in other


@pytest.mark.parametrize(
    "entry",
    ["", "[]", "{", told(images="many"), told(change={}), told(change_by_noise_level=3)],
)
def test_a_verdict_that_is_none_is_left_out(entry: str) -> None:
    card = model_card(
        Variant.create(BASE), {"ss_dmp_verdict": entry}, repo_id="me/x", filename="x.safetensors"
    )
    assert "## Verdict" not in card


def test_a_verdict_cannot_leave_its_place() -> None:
    entry = told(verdict="good\n\n# [Click](http://x)<script>")
    card = model_card(
        Variant.create(BASE), {"ss_dmp_verdict": entry}, repo_id="me/x", filename="x.safetensors"
    )
    assert "<script>" not in card
    assert "\n# [" not in card


def test_card_of_a_base_without_repository() -> None:
    card = model_card(Variant.create("dit-b/2"), {}, repo_id="me/x", filename="x.safetensors")
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "2,556,416 parameters" in card
