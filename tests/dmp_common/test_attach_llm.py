"""Attaching a patch: models whose captions come from a language model, and their tokens."""

from __future__ import annotations

import importlib

import diffusers
import pytest
import torch

from dmp_common import PatchError, Schedule, Settings, attach, detect_base
from dmp_common.bases.base import Latent, ModelCall
from dmp_common.bases.detect import naming_of
from dmp_common.bases.timesteps import embed_timesteps
from tests.dmp_common.attaching import check_fields, make, plain_field, watched
from tests.tiny import FAMILIES, Tiny
from tests.tinyllm import TEXT


def family(name: str) -> Tiny:
    if name not in FAMILIES:
        pytest.skip(f"diffusers {diffusers.__version__} does not know it")
    return FAMILIES[name]


@pytest.mark.parametrize("zero", [False, True], ids=["edit", "edit-2511"])
def test_references_of_qwen_edit_are_left_alone(zero):
    """Their tokens come after the picture's; Edit 2511 embeds timestep 0 for them besides."""
    tiny = family("qwen-image")
    model, patch = tiny.model(), make(tiny, sites="all")
    model.zero_cond_t = zero
    for block in model.transformer_blocks:
        block.zero_cond_t = zero
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 12), torch.float32, 1)
    reference = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(4))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], reference], dim=1)
    inputs["img_shapes"] = [[(1, 4, 6), (1, 4, 4)]] * 2
    base = tiny.call(model, inputs)
    with watched(model, patch) as seen:
        output = tiny.call(model, inputs)
    assert not torch.equal(output[:, :24], base[:, :24])
    assert seen.e[0].shape[0] == (4 if zero else 2)
    for name in patch.sites:
        added = seen.after[name] - seen.before[name]
        expected = plain_field(patch, name, seen.e[0][:2], (4, 6)).flatten(2).transpose(1, 2)
        assert (added[:, :24] - expected).abs().max() < 2e-5
        assert not added[:, 24:].any()


@pytest.mark.parametrize("cached", [False, True], ids=["after", "before, to fill a cache"])
def test_references_of_flux2_are_left_alone(cached):
    """Their tokens follow the latent's; while the model fills its cache of them, they precede."""
    tiny = family("flux2")
    model, patch = tiny.model(), make(tiny, sites="all")
    if cached:
        flux2 = importlib.import_module("diffusers.models.transformers.transformer_flux2")
        for block in model.transformer_blocks:
            block.attn.set_processor(flux2.Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(flux2.Flux2KVParallelSelfAttnProcessor())
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (4, 6), torch.float32, 1)
    reference = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(4))
    ids = torch.cartesian_prod(
        torch.tensor([10]), torch.arange(4), torch.arange(4), torch.arange(1)
    )
    order = slice(None, None, -1 if cached else 1)
    for name, part, dim in (("hidden_states", reference, 1), ("img_ids", ids, 0)):
        inputs[name] = torch.cat([inputs[name], part][order], dim=dim)
    if cached:
        inputs |= {"kv_cache_mode": "extract", "num_ref_tokens": 16}
    own = slice(16, None) if cached else slice(None, 24)
    with watched(model, patch) as seen:
        tiny.call(model, inputs)
    for name in patch.sites:
        added = seen.after[name] - seen.before[name]
        expected = plain_field(patch, name, seen.e[0], (4, 6)).flatten(2).transpose(1, 2)
        text = added.shape[1] - 24 - 16
        assert text == (TEXT if name.startswith("single") else 0)
        assert not added[:, :text].any()
        assert (added[:, text:][:, own] - expected).abs().max() < 2e-5
        added[:, text:][:, own] = 0.0
        assert not added.any()


def test_a_modulating_patch_refuses_what_is_kept_of_references():
    """Their keys and values would be those of the first step; the patch that adds leaves them."""
    tiny = family("flux2")
    model = tiny.model()
    inputs = tiny.inputs(torch.tensor([10.0]), (4, 6), torch.float32, 1)
    with attach(model, make(tiny, mix="modulate", sites="all")) as attachment:
        changed = tiny.call(model, inputs)
        for mode in ("extract", "cached"):
            with pytest.raises(PatchError, match="found kv_cache_mode: use the usual pipeline"):
                tiny.call(model, inputs | {"kv_cache_mode": mode})
        attachment.enabled = False
        plain = tiny.call(model, inputs)
        assert torch.equal(tiny.call(model, inputs | {"kv_cache_mode": "extract"}), plain)
    assert (changed - plain).norm() > 0.01 * plain.norm()


def test_shapes_of_qwen_image_may_be_one_of_each_item():
    tiny = family("qwen-image")
    model, patch = tiny.model(), make(tiny)
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 12), torch.float32, 1)
    with attach(model, patch):
        expected = tiny.call(model, inputs)
        assert torch.equal(tiny.call(model, inputs | {"img_shapes": [(1, 4, 6)] * 2}), expected)


def test_layered_qwen_image_is_no_model_of_the_base():
    """It makes several pictures in one sequence."""
    tiny = family("qwen-image")
    model = tiny.model()
    assert detect_base(model) is tiny.base
    model.time_text_embed.addition_t_embedding = torch.nn.Embedding(2, 32)
    assert naming_of(model, tiny.base) is None


@pytest.mark.parametrize("name", ["lumina2", "z-image"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_inverted_timesteps(name, train):
    """The model counts from noise to picture; e and schedules are those of 1000 - timestep."""
    tiny = family(name)
    model, patch = tiny.model(), make(tiny).train(train)
    for timestep in (0.0, 137.0, 333.25, 1000.0):
        with watched(model, patch) as seen:
            full = tiny.run(model, [timestep])
        expected = embed_timesteps(model, tiny.base, "diffusers", torch.tensor([timestep]))
        assert (seen.e[0] - expected).abs().max() < 1e-5
        with attach(model, patch, schedule=Schedule(first=timestep, last=timestep)):
            assert torch.equal(tiny.run(model, [timestep]), full)
        with attach(model, patch, schedule=Schedule(first=timestep - 0.1)):
            assert not torch.equal(tiny.run(model, [timestep]), full)
    first, last = embed_timesteps(model, tiny.base, "diffusers", torch.tensor([0.0, 1000.0]))
    assert not torch.allclose(first, last, atol=1e-2)


@pytest.mark.parametrize("where", [(5, 3), (3, 3), (0, 5)])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_image_tokens_that_begin_at_another_place_in_each_item(where, strength):
    tiny = family("lumina2")
    patch = make(tiny, grid=6)
    e = torch.randn(2, tiny.base.embedding)
    settings = Settings(strength)
    context = patch.prepare(e, (8, 12), settings, text_tokens=where)
    x = torch.randn(2, 5 + 24, 32)
    for _ in range(2):  # the second time from the cache
        added = context.add("layer.1", x) - x
        expected = strength * plain_field(patch, "layer.1", e, (4, 6)).flatten(2).transpose(1, 2)
        for item, start in enumerate(where):
            own = added[item, start : start + 24]
            assert (own - expected[item]).abs().max() < 2e-5
            assert not added[item, :start].any()
            assert not added[item, start + 24 :].any()
    other = patch.prepare(e, (8, 12), settings, text_tokens=tuple(reversed(where)))
    assert torch.equal(other.add("layer.1", x), context.add("layer.1", x)) is (where == (3, 3))
    with pytest.raises(PatchError, match="expected an input of shape"):
        context.add("layer.1", x[:, : 23 + max(where)])


def test_one_timestep_for_items_with_captions_of_different_lengths():
    tiny = family("lumina2")
    model, patch = tiny.model(), make(tiny, sites="all")
    with watched(model, patch) as seen, torch.no_grad():
        tiny.run(model, [400.0, 400.0, 400.0])
    check_fields(tiny, patch, seen, (8, 8))


@pytest.mark.parametrize(
    "latents",
    [
        [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 16)],
        [torch.zeros(4, 2, 8, 8)] * 2,
        [[torch.zeros(4, 1, 8, 8)]] * 2,
    ],
    ids=["sizes", "frames", "omni"],
)
def test_latents_that_share_no_grid_are_refused(latents):
    base = family("z-image").base

    def listed(latents: list) -> Latent:
        return base.latent["diffusers"](base, ModelCall((latents,), {}), torch.nn.Module())

    with pytest.raises(
        PatchError, match=r"one size \(C, 1, H, W\) in a batch of base tiny-z-image"
    ):
        listed(latents)
    assert listed([torch.zeros(4, 1, 8, 6)] * 3) == Latent(3, (8, 6), text_tokens=0)


def test_models_with_references_are_no_z_image():
    """Omni puts pictures it is shown into the sequence."""
    tiny = family("z-image")
    model = tiny.model()
    assert detect_base(model) is tiny.base
    model.siglip_embedder = torch.nn.Identity()
    assert naming_of(model, tiny.base) is None


def test_a_host_that_fills_up_its_tokens():
    """ComfyUI's Z-Image: [text; image; fillers], here 3 rows of 5 tokens and 17 fillers."""
    base = family("z-image").base
    host, call = torch.nn.Module(), ModelCall((torch.zeros(2, 4, 5, 9),), {})
    for multiple, tokens in ((32, 32), (None, None)):
        host.pad_tokens_multiple = multiple  # Lumina 2, of the same class, has None
        assert base.latent["ldm"](base, call, host) == Latent(2, (5, 9), image_tokens=tokens)
    patch = make(family("z-image"), sites="all")
    e = torch.randn(2, base.embedding)
    x = torch.randn(2, 32 + 32, 48)
    added = patch.prepare(e, (5, 9), image_tokens=32).add("layer.0", x) - x
    expected = plain_field(patch, "layer.0", e, (3, 5)).flatten(2).transpose(1, 2)
    assert (added[:, 32 : 32 + 15] - expected).abs().max() < 2e-5
    assert not added[:, :32].any()
    assert not added[:, 32 + 15 :].any()
