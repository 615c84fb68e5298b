"""What a patch can be made of, and what it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmp_common import Patch, PatchError, Variant, bases, get_base, known_bases, register_base


def test_defaults_are_the_paper() -> None:
    variant = Variant.create("dit-b/2")
    assert (variant.gate, variant.selection, variant.across_depth) == ("linear", "soft", "distinct")
    assert (variant.mix, variant.condition, variant.grids) == ("add", "t", 1)
    assert (variant.grid, variant.prompts, variant.count) == ((16, 16), 256, 256)
    assert (variant.prompt_init, variant.gate_init) == ("zero", "zero")
    assert variant.frequency_shift == 0.0
    assert len(variant.sites) == 12


def test_base_decides_prediction_and_shift() -> None:
    assert Variant.create("sd21").prediction == "v_prediction"
    assert Variant.create("flux").prediction == "flow"
    assert Variant.create("digits").frequency_shift == 1.0


def test_named_sets_of_sd15() -> None:
    sets = {name: Variant.create("sd15", sites=name).sites for name in get_base("sd15").site_sets}
    assert sets["encoder"] == (*(f"in.{n}" for n in range(1, 12)), "mid")
    assert sets["decoder"] == tuple(f"out.{n}" for n in range(12))
    assert sets["blocks"] == (
        *("in.1", "in.4", "in.7", "in.10", "mid"),
        *("out.0", "out.3", "out.6", "out.9"),
    )
    assert len(Variant.create("sd15", sites="all").sites) == 24
    assert Variant.create("sd15").sites == sets["encoder"]
    assert Variant.create("sd15", sites=["mid", "in.1"]).sites == ("in.1", "mid")
    assert Variant.create("sd15", sites=2).sites == ("in.1", "in.2")


def test_depth_stays_when_sites_are_left_out() -> None:
    assert Variant.create("sd15", sites=["mid"]).to_json()["sites"] == {"mid": 11}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "middle"}, "encoder, decoder, blocks"),
        ({"sites": 25}, "1 to 24"),
        ({"sites": 0}, "1 to 24"),
        ({"sites": True}, "1 to 24"),
        ({"sites": []}, "found none"),
        ({"sites": ["in.1", "in.1"]}, "repeated"),
        ({"sites": ["in.99"]}, "in.99"),
        ({"gate": "quantum"}, "'quantum'"),
        ({"gates": "linear"}, "unknown option gates"),
        ({"grid": 0}, "grid"),
        ({"grid": 1000}, "at most"),
        ({"grid": "16"}, "grid"),
        ({"grid": ("4", "4")}, "grid"),
        ({"grid": (4.0, 4.0)}, "grid"),
        ({"grid": 16.0}, "grid"),
        ({"sites": 2.5}, "site"),
        ({"sites": [["in.1"]]}, "site"),
        ({"grid": (16, 16), "prompts": 255}, "make them agree"),
        ({"grids": 0}, "grid"),
        ({"grids": 1.5}, "integers"),
        ({"condition": "t+y"}, "no class labels"),
        ({"mix": "prepend"}, "DiT bases only"),
        ({"gate": "none", "selection": "hard"}, "without gate"),
        ({"frequency_shift": 7}, "0 or 1"),
        ({"prediction": "noise"}, "epsilon"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        Variant.create("sd15", **options)


def test_unknown_base_lists_the_known_ones() -> None:
    with pytest.raises(PatchError, match=r"did you mean 'sd15'.*digits, cifar10, cifar10-s, sd15,"):
        Patch.create("sd1.5")


def test_register_refuses_another_base_of_the_same_name() -> None:
    base = get_base("sd15")
    assert register_base(base) is base
    other = bases.unet("sd15", widths=(8, 8), context=8, attention=(True, True))
    with pytest.raises(PatchError, match="exists already"):
        register_base(other)
    assert get_base("sd15") is base


def test_every_base_makes_every_variant_into_json_and_back() -> None:
    for base in known_bases():
        for options in ({}, {"gate": "attention", "grids": 2}, {"gate": "none"}):
            variant = Variant.create(base, **options)
            assert Variant.from_json(variant.to_json()) == variant
    prepend = Variant.create("digits", mix="prepend", condition="t+y")
    assert (prepend.grid, prepend.prompts) == (None, 50)
    assert Variant.from_json(prepend.to_json()) == prepend


def test_site_names_and_paths_are_unique() -> None:
    for base in known_bases():
        assert len({site.name for site in base.sites}) == len(base.sites)
        for naming in base.times:
            paths = {site.paths[naming] for site in base.sites}
            assert len(paths) == len(base.sites)


SHAPED: dict[str, dict[str, Any]] = {
    "linear": {},
    "attention": {"gate": "attention"},
    "attention without depth": {"gate": "attention", "across_depth": "uniform"},
    "none": {"gate": "none"},
    "hard": {"selection": "hard"},
    "uniform": {"across_depth": "uniform"},
    "class": {"condition": "t+y"},
    "prepended": {"mix": "prepend", "prompts": 7},
    "three grids": {"grids": 3, "grid": (2, 5)},
    "a weight for each grid": {"grids": 4, "gate_unit": "grid"},
    "stages": {"grids": 4, "gate_unit": "grid", "gate_form": "residual"},
    "attention over grids": {"grids": 4, "gate_unit": "grid", "gate": "attention"},
    "residual prompts": {"gate_form": "residual"},
    "two sites": {"sites": ["block.1", "block.4"]},
}


@pytest.mark.parametrize("options", SHAPED.values(), ids=SHAPED)
def test_shapes_are_those_of_the_file(options: dict[str, Any]) -> None:
    patch = Patch.create("dit-s/2", **options)
    expected = [(name, tuple(parameter.shape)) for name, parameter in patch.saved().items()]
    assert list(patch.variant.shapes().items()) == expected


@pytest.mark.parametrize("base", [base.name for base in known_bases()])
def test_shapes_on_every_base(base: str) -> None:
    with torch.device("meta"):
        patch = Patch.create(base, sites="all")
    expected = {name: tuple(parameter.shape) for name, parameter in patch.saved().items()}
    assert patch.variant.shapes() == expected
