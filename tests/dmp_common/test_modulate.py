"""Modulating patches: x' = x (1 + strength s(t)) + strength b(t) at the outputs of modules."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from dmp_common import Patch, PatchError, Schedule, Settings, attach
from dmp_common.attach.modulation import Part, parts_of
from dmp_common.bases.base import find_module
from tests.dmp_common.attaching import (
    DIT,
    FLUX,
    REPRESENTATIVES,
    SD15,
    checkpoint,
    close,
    same_weights,
    some,
    structure,
    weights,
)
from tests.tiny import FAMILIES

T = torch.tensor([20.0, 700.0])


def modulating(tiny, seed: int = 0, std: float = 0.1, **options) -> Patch:
    """A patch that scales and shifts at random."""
    torch.manual_seed(seed)
    patch = Patch.create(tiny.base, mix="modulate", **options).eval()
    with torch.no_grad():
        for parameter in patch.pools.parameters():
            parameter.normal_(std=std)
        for parameter in patch.gate.parameters():
            parameter.normal_(std=0.2)
    return patch


def restated(patch: Patch, e: torch.Tensor, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (T, D) of a site with a residual gate of pairs, in float64."""
    variant = patch.variant
    inputs = e.double()
    if variant.across_depth == "distinct":
        depth = torch.full((len(e), 1), float(variant.depths[site]), dtype=torch.float64)
        inputs = torch.cat([inputs, depth], dim=1)
    logits = inputs @ patch.gate.weight.double().T + patch.gate.bias.double()
    gates = 1 + logits if variant.gate_form == "residual" else logits.softmax(-1)
    mixed = torch.einsum("tk,kpd->tpd", gates, patch.saved()[f"prompts.{site}"].double())
    return mixed[:, 0], mixed[:, 1]


@pytest.mark.parametrize("sites", ["linear", "all"])
def test_zero_patch_and_strength_zero_are_the_base(tiny, sites):
    model = tiny.model()
    base, shape, before = tiny.run(model), structure(model), weights(model)
    zero = Patch.create(tiny.base, mix="modulate", sites=sites).eval()
    patch = modulating(tiny, sites=sites)
    with attach(model, zero):
        assert torch.equal(tiny.run(model), base)
        with torch.no_grad():
            assert torch.equal(tiny.run(model), base)
    with attach(model, patch, strength=0.0):
        assert torch.equal(tiny.run(model), base)
    with attach(model, patch):
        assert not torch.equal(tiny.run(model), base)
    assert structure(model) == shape
    assert same_weights(model, before)
    assert torch.equal(tiny.run(model), base)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "none"},
        {"gate_form": "softmax", "gate_init": "random", "across_depth": "distinct"},
    ],
    ids=["stages", "none", "softmax"],
)
@some(*REPRESENTATIVES)
def test_patch_forward_is_the_formula(tiny, options):
    patch, strength = modulating(tiny, **options), 0.7
    e = torch.randn(2, tiny.base.embedding)
    for name, site in list(patch.sites.items())[:3]:
        shape = (2, site.width, 3, 3) if site.axis == 1 else (2, 5, site.width)
        x = torch.randn(shape)
        found = patch(x, name, e, strength)
        if options.get("gate") == "none":
            scale, shift = patch.saved()[f"prompts.{name}"][0].double().unbind(0)
            scale, shift = scale.expand(2, -1), shift.expand(2, -1)
        else:
            scale, shift = restated(patch, e, name)
        wide = [2, site.width, 1, 1] if site.axis == 1 else [2, 1, site.width]
        expected = x * (1 + strength * scale.reshape(wide)) + strength * shift.reshape(wide)
        assert close(found.double(), expected)


def test_attached_outputs_are_the_formula(tiny):
    """Every module's own output, before and after, with another timestep for each item."""
    model, patch = tiny.model(), modulating(tiny, sites="all")
    before, after, embeddings = {}, {}, []
    naming = "diffusers"
    parts = parts_of(patch.sites.values(), naming)
    hooks = []

    def keep(place, path):
        def hook(module, args, output):
            place.setdefault(path, output.detach().clone())

        return hook

    first = next(iter(parts))
    hooks.append(find_module(model, first).register_forward_hook(keep(before, first)))
    with attach(model, patch) as attachment:
        hooks.append(find_module(model, first).register_forward_hook(keep(after, first)))
        runtime = attachment.patch.runtime
        plain = runtime.prepare
        runtime.prepare = lambda e, *args, **named: embeddings.append(e) or plain(e, *args, **named)
        with torch.no_grad():
            tiny.run(model, timesteps=T)
    for hook in hooks:
        hook.remove()
    e = embeddings[0].detach().float()
    part, site = parts[first][0], patch.sites[parts[first][0].site]
    scale, shift = restated(patch, e, part.site)
    x = before[first].double()
    shape = [len(e), *[1] * (x.dim() - 1)]
    shape[site.axis] = -1
    assert close(after[first].double(), x * (1 + scale.reshape(shape)) + shift.reshape(shape), 1e-5)


def test_items_of_a_batch_are_as_alone(kind):
    model, patch = kind.model(), modulating(kind, sites="all")
    with attach(model, patch) as attachment, torch.no_grad():
        both = kind.run(model, timesteps=T)
        attachment.item_strengths = torch.tensor([0.0, 1.0])
        second = kind.run(model, timesteps=T)
        attachment.item_strengths = None
        assert torch.equal(kind.run(model, timesteps=T), both)
    with torch.no_grad():
        plain = kind.run(model, timesteps=T)
    assert close(second[:1], plain[:1], 1e-6)
    assert close(second[1:], both[1:], 1e-6)
    assert not close(both[:1], plain[:1], 1e-4)


def test_training_is_what_is_used_later(kind):
    """The same output with gradients (new tensors) and from the cache (changed in place)."""
    model, patch = kind.model(), modulating(kind, sites="all")
    model.requires_grad_(False)
    with attach(model, patch):
        patch.train()
        trained = kind.run(model, timesteps=T)
        trained.square().mean().backward()
        patch.eval()
        with torch.no_grad():
            assert close(kind.run(model, timesteps=T), trained.detach(), 1e-5)
            assert torch.equal(kind.run(model, timesteps=T), kind.run(model, timesteps=T))
    assert all(parameter.grad.abs().sum() > 0 for parameter in patch.parameters())


@some(*REPRESENTATIVES)
def test_patches_compose_in_the_order_of_attaching(tiny):
    model = tiny.model()
    first, second = modulating(tiny, 1), modulating(tiny, 2)
    outputs = []
    for order in ((first, second), (second, first)):
        attachments = [attach(model, patch) for patch in order]
        with torch.no_grad():
            outputs.append(tiny.run(model))
        for attachment in attachments:
            attachment.remove()
    assert not torch.equal(*outputs)  # x (1 + s1) (1 + s2) + b1 (1 + s2) + b2 is not symmetric
    e = torch.randn(1, tiny.base.embedding)
    name, site = next(iter(first.sites.items()))
    x = torch.randn(1, 4, site.width) if site.axis == -1 else torch.randn(1, site.width, 4, 4)
    contexts = [patch.prepare(e, (8, 8)) for patch in (first, second)]
    composed = x
    for context in contexts:
        composed = context.modulate((Part(name, 0),), composed.clone())
    assert close(composed, second(first(x, name, e), name, e))


@some(*REPRESENTATIVES)
def test_adds_and_modulates_together(tiny):
    model = tiny.model()
    adds, modulates = tiny.patch(3), modulating(tiny)
    with attach(model, adds), attach(model, modulates):
        one = tiny.run(model)
    with attach(model, modulates), attach(model, adds):
        assert torch.equal(tiny.run(model), one)  # they act at different places
    with attach(model, adds):
        assert not torch.equal(tiny.run(model), one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some(SD15, DIT, FLUX)
def test_half_precision_rounds_the_change_only(tiny, dtype):
    """The scale 1 + s itself is never rounded: the error is that of one rounding of the result."""
    patch = modulating(tiny)
    with torch.no_grad():
        for parameter in patch.pools.parameters():
            parameter.fill_(0.001)
        for parameter in patch.gate.parameters():
            parameter.zero_()
    name, site = next(iter(patch.sites.items()))
    torch.manual_seed(0)
    shape = (1, 64, site.width) if site.axis == -1 else (1, site.width, 64, 64)
    x = (1 + torch.rand(shape)).to(dtype)
    with torch.no_grad():
        context = patch.prepare(torch.zeros(1, tiny.base.embedding), (8, 8))
        found = context.modulate((Part(name, 0),), x.clone()).double()
    expected = x.double() * 1.004 + 0.004  # four pairs of weight 1
    half = torch.finfo(dtype).eps  # of the last digit of values from 2 to 4
    assert float((found - expected).abs().max()) < 1.1 * half


def test_a_schedule_and_sites_choose(kind):
    model, patch = kind.model(), modulating(kind)
    names = list(patch.sites)
    with torch.no_grad():
        plain = kind.run(model, timesteps=T)
        with attach(model, patch, schedule=Schedule(first=1000.0, last=500.0)):
            part = kind.run(model, timesteps=T)
        assert close(part[:1], plain[:1], 1e-6)
        assert not close(part[1:], plain[1:], 1e-4)
        with attach(model, patch, sites=dict.fromkeys(names[1:], 0.0)):
            one = kind.run(model, timesteps=T)
        with attach(model, patch, sites=names[:1]):
            assert close(kind.run(model, timesteps=T), one, 1e-6)
        with attach(model, patch, sites={names[0]: 0.5}):
            assert not torch.equal(kind.run(model, timesteps=T), one)


def test_parts_of_one_output_act_by_themselves():
    """A fused layer holds several sites; those that do not act, and the rest, stay as they are."""
    patch = modulating(SD15, sites="linear")
    first, second = list(patch.sites)[:2]
    width = patch.sites[first].width
    parts = (Part(first, 0), Part(second, width + 3))
    e, x = torch.randn(1, SD15.base.embedding), torch.randn(1, 4, 2 * width + 8)
    found = patch.prepare(e, None).modulate(parts, x.clone())
    assert torch.equal(found[..., width : width + 3], x[..., width : width + 3])
    assert torch.equal(found[..., 2 * width + 3 :], x[..., 2 * width + 3 :])
    assert close(found[..., :width], patch(x[..., :width], first, e))
    other = x[..., width + 3 : 2 * width + 3]
    assert close(found[..., width + 3 : 2 * width + 3], patch(other, second, e))
    only = patch.prepare(e, None, Settings(sites=frozenset({second}))).modulate(parts, x.clone())
    assert torch.equal(only[..., : width + 3], x[..., : width + 3])
    with pytest.raises(PatchError, match="channels"):
        patch.prepare(e, None).modulate((Part(first, 0),), x[..., : width - 1])


@some(*REPRESENTATIVES)
def test_copies_and_threads(tiny):
    model, patch = tiny.model(), modulating(tiny)
    with attach(model, patch) as attachment, torch.no_grad():
        expected = tiny.run(model)
        other = copy.deepcopy(model)
        results = [None] * 4

        def call(number):
            with torch.no_grad():
                results[number] = tiny.run(model)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, expected) for result in results)
        attachment.remove()
        assert torch.equal(tiny.run(other), expected)  # a copy is patched independently


@some(SD15, DIT, FAMILIES["sd3"])
def test_gradient_checkpointing_has_the_same_gradients(tiny):
    gradients = []
    for checkpoints in (False, True):
        model, patch = tiny.model(), modulating(tiny)
        model.requires_grad_(False)
        if checkpoints:
            checkpoint(model)
            model.train()
        with attach(model, patch.train()):
            output = tiny.run(model, timesteps=T)
            tiny.run(model, timesteps=T.flip(0))  # another call before the backward pass
            output.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in patch.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert close(checkpointed, plain, 1e-4)


@some(SD15, DIT, FLUX)
def test_file_holds_it_and_older_readers_refuse_it(tiny, tmp_path):
    model, patch = tiny.model(), modulating(tiny)
    path = tmp_path / "m.safetensors"
    patch.save(path)
    loaded = Patch.load(path)
    assert loaded.variant == patch.variant
    assert loaded.metadata["dmp.format_version"] == "2"
    assert all(tensor.shape[:2] == (4, 2) for name, tensor in patch.saved().items() if "p." in name)
    with torch.no_grad(), attach(model, patch):
        expected = tiny.run(model)
    with torch.no_grad(), attach(model, loaded):
        assert torch.equal(tiny.run(model), expected)


def test_a_file_of_version_1_cannot_modulate(tmp_path):
    path = tmp_path / "m.safetensors"
    modulating(DIT).save(path)
    data = path.read_bytes().replace(b'"dmp.format_version":"2"', b'"dmp.format_version":"1"')
    path.write_bytes(data)
    with pytest.raises(PatchError, match=r"expected format version 2 .* found version 1"):
        Patch.load(path)


def test_impossible_variants_are_refused():
    for wrong in ({"grid": (4, 4)}, {"prompts": 3}, {"gate_unit": "prompt"}, {"sites": "encoder"}):
        with pytest.raises(PatchError):
            Patch.create(DIT.base, mix="modulate", **wrong)
    with pytest.raises(PatchError, match="guidance"):
        Patch.create(DIT.base, guidance=1.0)


def test_fused_projections_are_refused():
    model = SD15.model()
    model.fuse_qkv_projections()
    with pytest.raises(PatchError, match="unfuse_qkv_projections"):
        attach(model, modulating(SD15))


def test_guidance_patch_acts_on_conditional_items_alone():
    """On class labels: the last one is none. Elsewhere the attachment is told."""
    model, patch = DIT.model(), DIT.patch(1, guidance=4.0)
    labels = torch.tensor([3, model.config.num_embeds_ada_norm])
    inputs = DIT.inputs(T, (8, 8), torch.float32, 0) | {"class_labels": labels}
    with torch.no_grad():
        plain = model(**inputs).sample
        with attach(model, patch):
            guided = model(**inputs).sample
    assert torch.equal(guided[1], plain[1])
    assert not torch.equal(guided[0], plain[0])

    unet, patch = SD15.model(), SD15.patch(1, guidance=7.5)
    with torch.no_grad():
        plain = SD15.run(unet, timesteps=T)
        with attach(unet, patch) as attachment:
            everything = SD15.run(unet, timesteps=T)
            attachment.conditional = lambda items: torch.arange(items) >= items // 2
            half = SD15.run(unet, timesteps=T)
    assert close(half[:1], plain[:1], 1e-6)
    assert close(half[1:], everything[1:], 1e-6)


@some(SD15, DIT)
def test_compiled_blocks(tiny):
    """Blocks that are compiled by themselves run as written while the patch acts."""
    with torch.no_grad():
        model, patch = tiny.model(), modulating(tiny)
        base = tiny.run(model)
        with attach(model, patch):
            expected = tiny.run(model)
        children = getattr(model, "transformer_blocks", None) or [model.mid_block]
        for block in children:
            block.compile(backend="eager")
        assert torch.equal(tiny.run(model), base)
        with attach(model, patch) as attachment:
            assert torch.equal(tiny.run(model), expected)
            attachment.enabled = False
            assert torch.equal(tiny.run(model), base)
        assert torch.equal(tiny.run(model), base)


@pytest.mark.skipif(
    torch.__version__ < (2, 4), reason="older compilers do not trace hooks on outputs"
)
@some(DIT)
def test_compiled_whole(tiny):
    torch._dynamo.reset()
    with torch.no_grad():
        model, patch = tiny.model(), modulating(tiny)
        with attach(model, patch, strength=0.5):
            half = tiny.run(model)
        with attach(model, patch) as attachment:
            expected = tiny.run(model)
            compiled = torch.compile(model, backend="eager")
            assert close(tiny.run(compiled), expected, 1e-5)
            attachment.strength = 0.5
            assert close(tiny.run(compiled), half, 1e-5)
