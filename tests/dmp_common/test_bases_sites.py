"""The bases: sites and parameters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dmp_common import Patch, PatchError, get_base
from tests.dmp_common.realbases import count, model_of

README = Path(__file__).resolve().parents[2] / "README.md"


def saved(base: str, **variant) -> int:
    """Saved parameters: as the patch counts them, and from the sizes of the table."""
    with torch.device("meta"):
        patch = Patch.create(base, **variant)
    n, e = patch.variant.prompts, patch.base.embedding
    expected = n * (e + 1) + n + sum(n * site.width for site in patch.sites.values())
    assert patch.saved_parameters == expected
    assert patch.saved_parameters == sum(t.numel() for t in patch.saved().values())
    return patch.saved_parameters


@pytest.mark.parametrize(
    ("base", "parameters", "share", "model"),
    [
        ("dit-b/2", 2_556_416, 1.96, 130e6),
        ("dit-l/2", 6_554_112, 1.43, 458e6),
        ("dit-xl/2", 8_552_960, 1.27, 675e6),
        ("sd15", 2_785_792, 0.32, 859.5e6),
        ("sdxl", 1_802_752, 0.07, 2567e6),
    ],
)
def test_saved_parameters_are_those_of_the_paper(base, parameters, share, model):
    assert saved(base) == parameters
    assert 100 * parameters / model == pytest.approx(share, abs=0.01)


def told_in_readme() -> dict[str, int]:
    """The saved parameters that README's table gives each base of a row, or the first of a row."""
    told: dict[str, int] = {}
    lines = README.read_text(encoding="utf-8").partition("\n## Bases\n")[2].partition("\n## ")[0]
    for line in lines.splitlines():
        if line.startswith("| `"):
            names, numbers = line.split("|")[1], line.split("|")[3]
            counts = [int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", numbers)]
            told |= dict(zip(re.findall(r"`([\w./-]+)`", names), counts, strict=False))
    return told


def test_saved_parameters_are_those_of_readme():
    told = told_in_readme()
    del told["dit-s/2"]  # its row gives DiT-B/2
    assert len(told) >= 20
    assert told == {base: saved(base) for base in told}


def test_saved_parameters_of_all_sites():
    assert 100 * saved("sd15", sites="all") / 859_520_964 == pytest.approx(0.67, abs=0.005)
    assert saved("sd15", sites="encoder") == saved("sd15")
    assert saved("sd21") == saved("sd15")


def test_size_of_the_dit_is_that_of_the_paper():
    """diffusers gives every block its own time and label embedding; the original has one."""
    model = model_of("dit-xl/2")
    extra = 27 * count(model.transformer_blocks[0].norm1.emb)
    positions = 256 * 1152  # counted there, a buffer here
    assert count(model) - extra + positions == 675_129_632


def sites_of(base: str, choice) -> list[str]:
    return [site.name for site in get_base(base).select(choice)]


@pytest.mark.parametrize("base", ["sd15", "sd21"])
def test_site_sets_of_sd(base):
    encoder = [f"in.{n}" for n in range(1, 12)] + ["mid"]
    decoder = [f"out.{n}" for n in range(12)]
    assert sites_of(base, "encoder") == encoder
    assert sites_of(base, "decoder") == decoder
    assert sites_of(base, "all") == encoder + decoder
    assert sites_of(base, "blocks") == [
        *("in.1", "in.4", "in.7", "in.10", "mid"),
        *("out.0", "out.3", "out.6", "out.9"),
    ]
    assert get_base(base).default_sites == "encoder"
    table = {site.name: (site.width, site.stride) for site in get_base(base).sites}
    widths = [320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280]
    widths += [1280, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320]
    strides = [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, *[8] * 3, *[4] * 3, *[2] * 3, *[1] * 3]
    assert list(table.values()) == list(zip(widths, strides, strict=True))


def test_site_sets_of_sdxl():
    assert len(sites_of("sdxl", "all")) == 18
    assert sites_of("sdxl", "encoder") == [*(f"in.{n}" for n in range(1, 9)), "mid"]
    assert sites_of("sdxl", "decoder") == [f"out.{n}" for n in range(9)]
    assert len(sites_of("sdxl", "blocks")) == 7


def test_named_set_blocks_is_the_first_site_of_each_diffusers_block():
    for base in map(get_base, ("sd15", "sd21", "sdxl")):
        firsts = []
        for site in base.sites:
            block = ".".join(site.paths["diffusers"].split(".")[:2]).replace(".resnets", "")
            firsts += [] if block in dict(firsts) else [(block, site.name)]
        assert sites_of(base.name, "blocks") == [site for _, site in firsts]


@pytest.mark.parametrize(
    ("base", "count_of_sites"),
    [
        *(("digits", 6), ("dit-s/2", 12), ("dit-b/4", 12), ("dit-l/8", 24), ("dit-xl/2", 28)),
        *(("pixart", 28), ("sd3", 24), ("sd35-medium", 24), ("sd35-large", 38), ("flux", 57)),
        *(("flux2", 56), ("flux2-klein-4b", 25), ("flux2-klein-9b", 32)),
        *(("qwen-image", 60), ("z-image", 30), ("lumina2", 26)),
        *(("chroma", 57), ("ernie-image", 36), ("krea2", 28), ("anima", 28)),
        ("qwen-image-2.1", 32),
        *(("wan-1.3b", 30), ("wan-14b", 40), ("wan21-i2v-14b", 40), ("wan22-i2v-14b", 40)),
        ("wan22-5b", 30),
    ],
)
def test_sites_of_transformers(base, count_of_sites):
    assert len(get_base(base).sites) == count_of_sites
    assert sites_of(base, "all") == sites_of(base, get_base(base).default_sites)
    assert sites_of(base, 2) == sites_of(base, "all")[:2]
    assert get_base(base).depths == {name: i for i, name in enumerate(sites_of(base, "all"))}


def test_depth_of_a_site_does_not_depend_on_the_choice():
    with torch.device("meta"):
        patch = Patch.create("sd15", sites=["out.3", "mid"])
    assert list(patch.sites) == ["mid", "out.3"]
    assert patch.gate.depths(torch.device("cpu")).tolist() == [11.0, 15.0]


@pytest.mark.parametrize(
    "choice",
    ["nowhere", 0, -1, 25, True, [], ["in.1", "in.1"], ["in.0"], ["in.1", "block.3"], ()],
)
def test_choices_without_sites(choice):
    with pytest.raises(PatchError, match="base sd15"):
        get_base("sd15").select(choice)
