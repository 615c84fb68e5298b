"""The bases: what a forward call says about its latents, and bases of users' own."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys
import types

import pytest
import torch

import dmp_common as dmp
from dmp_common import Base, PatchError, Site, attach, bases, get_base
from dmp_common.bases import table
from dmp_common.bases.base import Argument, ModelCall, Probe, TimeSource
from dmp_common.bases.llm import ZImage
from dmp_common.bases.table import TABLE
from tests.dmp_common.attaching import DIT, make
from tests.tiny import FAMILIES, Tiny

TOKENS = [tiny for tiny in FAMILIES.values() if tiny.base.layout == "tokens"]


@pytest.mark.parametrize("tiny", TOKENS, ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("by", ["keyword", "position"])
def test_the_latent_is_read_from_the_call(tiny: Tiny, by: str):
    """Arguments are found by their names and by their places in diffusers' own signatures."""
    size = (8, 8) if tiny.square_only else (8, 12)
    model, base = tiny.model(), tiny.base
    inputs = tiny.inputs(torch.tensor([10.0, 900.0, 5.0]), size, torch.float32, 1)
    call = ModelCall((), inputs)
    if by == "position":
        signature = inspect.signature(inspect.unwrap(type(model).forward))
        bound = signature.bind(model, **inputs)
        bound.apply_defaults()
        call = ModelCall(bound.args[1:], bound.kwargs)
    latent = base.latent["diffusers"](base, call, model)
    assert (latent.batch, latent.size) == (3, size)
    starts = [latent.text_tokens] if isinstance(latent.text_tokens, int) else latent.text_tokens
    expected = None if tiny.text is None else tiny.starts(3, 0, 0)
    assert starts is None if expected is None else set(starts) == set(expected)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image", "anima", "chroma"])
def test_references_that_a_host_holds_beside_the_call(name: str, monkeypatch):
    """Forge Neo's models read them off an object that their module imports; Chroma takes none."""
    base, module = get_base(name), types.ModuleType("host_of_models")
    monkeypatch.setitem(sys.modules, "host_of_models", module)
    model = type("Model", (torch.nn.Module,), {"__module__": "host_of_models"})()
    call = ModelCall((torch.zeros(2, 16, 1, 8, 6),), {})
    before = base.latent["ldm"](base, call, model)
    module.dynamic_args = types.SimpleNamespace(ref_latents=[])
    assert base.latent["ldm"](base, call, model) == before
    if name != "chroma":
        module.dynamic_args.ref_latents = [torch.zeros(1, 16, 1, 8, 6)]
    found, cells = base.latent["ldm"](base, call, model), 48 // base.sites[0].stride ** 2
    assert found.size == (8, 6)
    assert found.image_tokens == (cells if name == "chroma" else 2 * cells)
    assert found.text_tokens == (0 if name == "anima" else None)


def test_a_call_without_a_latent_is_explained():
    base = get_base("pixart")
    for call in (ModelCall((), {}), ModelCall((torch.zeros(2, 4),), {}), ModelCall(([],), {})):
        with pytest.raises(PatchError, match=r"expected a latent \(B, C, H, W\) .* base pixart"):
            base.latent["diffusers"](base, call, torch.nn.Module())


def test_a_base_of_earlier_versions_still_works(monkeypatch):
    """A transformer's Base without `latent`: its first argument is a map."""
    tiny = DIT
    fields = {f.name: getattr(tiny.base, f.name) for f in dataclasses.fields(Base)}
    del fields["latent"], fields["time_bias"]
    old = Base(**{**fields, "name": "tiny-old-dit"})
    # Another base of the same structure would confuse other tests: it goes when this one ends.
    monkeypatch.setattr(table, "_registered", dict(table._registered))
    assert dmp.register_base(old) is old
    model = tiny.model()
    expected = make(tiny)
    patch = make(dataclasses.replace(tiny, base=old))
    with attach(model, expected):
        output = tiny.run(model)
    # Detection finds the first base with this structure; the patch's own base is what is asked.
    with attach(model, patch):
        assert torch.equal(tiny.run(model), output)


@pytest.mark.parametrize("field", ["positions", "caption_mask"])
def test_fields_of_earlier_versions_are_explained(field):
    fields = vars(get_base("pixart")) | {"name": "mine", field: Argument("img_ids", 4)}
    with pytest.raises(PatchError) as error:
        Base(**fields)
    for part in ("base mine", "`latent`", f"`{field}`", "'img_ids'", "latent={'diffusers'"):
        assert part in str(error.value)


def one_naming() -> Base:
    """A base of a user that knows diffusers' naming only."""
    argument = Argument("hidden_states", 0)
    site = Site("block.0", 8, 2, {"diffusers": "blocks.0"}, {"diffusers": argument})
    source = TimeSource("time", Argument("timestep", 1), "time")
    probes = {"diffusers": (Probe("blocks.0", None, True),)}
    return Base("mine", (site,), "tokens", 8, 8, {"diffusers": source}, probes)


def test_a_naming_that_a_base_does_not_have_is_explained():
    base = one_naming()
    for facts, what in (
        (base.times, "`times` of base mine"),
        (base.probes, "`probes` of base mine"),
        (base.sites[0].paths, "a module of site block.0"),
        (base.sites[0].arguments, "an argument of site block.0"),
    ):
        with pytest.raises(PatchError, match=f"expected {what} in the naming 'ldm', found it in"):
            facts["ldm"]
        assert facts.get("ldm") is None
        assert list(facts) == ["diffusers"]


def test_a_base_of_one_naming_can_be_detected(monkeypatch):
    monkeypatch.setattr("dmp_common.bases.table._registered", {"mine": one_naming()})
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    assert dmp.detect_base(model) == one_naming()
    with pytest.raises(PatchError, match="expected a model of one of the bases"):
        dmp.detect_base(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_rows_are_data(row):
    """A base is built once from its row, can be copied and sent to another process."""
    base = get_base(row.name)
    assert get_base(row.name) is base
    assert row.base() == base
    assert copy.deepcopy(base) == base
    assert pickle.loads(pickle.dumps(base)) == base
    assert dmp.register_base(row.base()) == base


def test_builders_take_the_numbers_of_a_row():
    facts = {"depth": 2, "width": 32, "hub_id": None}
    assert bases.z_image("mine", **facts) == ZImage("mine", **facts).base()
