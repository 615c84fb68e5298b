"""Attaching a patch to a tiny model of every family: what it changes, and what it must not."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dmp_common as dmp
from dmp_common import Patch, PatchError, Schedule, Settings, attach
from dmp_common.prompts import PromptPool
from dmp_common.sites import find_module
from tests.tiny import FAMILIES, Tiny

UNETS = [FAMILIES[name] for name in ("sd15", "sd21", "sdxl")]
DIT, FLUX, SD15 = FAMILIES["dit"], FAMILIES["flux"], FAMILIES["sd15"]
REPRESENTATIVES = [SD15, DIT, FLUX]  # map; tokens with e inside; tokens packed with text


# sd21 and sd35 differ from sd15 and sd3 in how they are recognised only: enough of them in the
# tests that name every family.
KINDS = [family for name, family in FAMILIES.items() if name not in ("sd21", "sd35")]


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def tiny(request) -> Tiny:
    return request.param


@pytest.fixture(params=KINDS, ids=lambda family: family.name)
def kind(request) -> Tiny:
    return request.param


def some(*families: Tiny):
    """The test for these families only."""
    return pytest.mark.parametrize("tiny", families, ids=lambda family: family.name)


def make(tiny: Tiny, seed: int = 0, **options) -> Patch:
    """A random patch whose gate is soft: some thirty prompts matter at each timestep."""
    patch = tiny.patch(seed, **options)
    with torch.no_grad():
        for parameter in patch.gate.parameters():
            parameter.mul_(0.2)
    return patch


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to `tolerance` of the largest value."""
    scale = expected.abs().max().item()
    return (found - expected).abs().max().item() <= tolerance * max(scale, 1e-3)


def base_output(tiny: Tiny, model: nn.Module, dtype: torch.dtype) -> Tensor:
    """The model's output, where this release of torch can compute it on a CPU at all."""
    try:
        return tiny.run(model, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"the model itself cannot: {error}")


def checkpoint(model: nn.Module) -> None:
    """Enables gradient checkpointing, where diffusers has it in the form that can be bound."""
    model.enable_gradient_checkpointing()
    if not any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        pytest.skip("diffusers before 0.33 checkpoints otherwise, which is refused (see below)")


def structure(model: nn.Module) -> dict[str, dict[str, object]]:
    """Every attribute of every module: dictionaries by content, the rest by identity."""
    return {
        name: {
            key: list(value.items()) if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)


def pick(inputs: dict, rows: list[int], batch: int) -> dict:
    """Items of a batch; position ids are those of all items."""
    return {
        key: pick(value, rows, batch)
        if isinstance(value, dict)
        else value[rows]
        if value is not None and not key.endswith("_ids")
        else value
        for key, value in inputs.items()
    } | ({"time_ids": inputs["time_ids"][rows]} if "time_ids" in inputs else {})


def plain_field(patch: Patch, site: str, e: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. 3 for one site in float64, resized by F.interpolate: (B, D, H, W)."""
    depth = [s.name for s in patch.base.sites].index(site)
    inputs = torch.cat([e.double(), torch.full((len(e), 1), float(depth)).double()], dim=1)
    gate = inputs @ patch.gate.weight.double().T + patch.gate.bias.double()
    prompts = patch.saved()[f"prompts.{site}"][0].double()
    field = gate.softmax(-1)[..., None] * prompts
    field = field.unflatten(1, patch.variant.grid).permute(0, 3, 1, 2)
    if size != patch.variant.grid:
        field = F.interpolate(field, size, mode="bilinear", align_corners=False, antialias=True)
    return field.detach()


def is_field(added: Tensor, x: Tensor, expected: Tensor) -> bool:
    """Whether the difference of x + field and x is the field, but for float32 rounding."""
    tolerance = 4e-6 * expected.abs().max() + 3e-7 * x.abs() + 1e-6
    return bool(((added - expected).abs() <= tolerance).all())


@dataclasses.dataclass
class Seen:
    """Site inputs as the model gave them, as its blocks received them, and the time embedding."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    e: list[Tensor]


@contextmanager
def watched(model: nn.Module, patch: Patch, **settings) -> Iterator[Seen]:
    """The patch attached, between two watching hooks of our own at every site."""
    seen = Seen({}, {}, [])

    def watch(store: dict[str, Tensor], site: dmp.Site):
        key = site.arguments["diffusers"]

        def hook(module, args, kwargs):
            x = args[key.index] if len(args) > key.index else kwargs[key.name]
            store[site.name] = x.clone(memory_format=torch.preserve_format)

        module = find_module(model, site.paths["diffusers"])
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    sites = patch.sites.values()
    mlp = find_module(model, patch.base.times["diffusers"].mlp)
    handles = [watch(seen.before, site) for site in sites]
    handles.append(mlp.register_forward_hook(lambda m, args, out: seen.e.append(out)))
    with attach(model, patch, **settings):
        handles += [watch(seen.after, site) for site in sites]
        yield seen
    for handle in handles:
        handle.remove()


def check_fields(tiny: Tiny, patch: Patch, seen: Seen, latent: tuple[int, int], strength=1.0):
    """What arrived at each block is what the model gave plus the plain field, nowhere else."""
    assert set(seen.before) == set(seen.after) == set(patch.sites)
    e = seen.e[0]
    for name, site in patch.sites.items():
        before, after = seen.before[name], seen.after[name]
        assert before.shape == after.shape
        added = after - before
        if patch.base.layout == "map":
            size = before.shape[2:]
            own, rest = added[:, : site.width], added[:, site.width :]
            x = before[:, : site.width]
            # Rounding up or down at odd sizes is the model's business.
            assert abs(size[0] - latent[0] / site.stride) < 1
            assert abs(size[1] - latent[1] / site.stride) < 1
            expected = plain_field(patch, name, e, tuple(size))
        else:
            size = latent[0] // site.stride, latent[1] // site.stride
            tokens = size[0] * size[1]
            own, rest = added[:, -tokens:], added[:, :-tokens]
            x = before[:, -tokens:]
            expected = plain_field(patch, name, e, size).flatten(2).transpose(1, 2)
        assert expected.abs().max() > 0.01
        assert is_field(own, x, strength * expected), name
        assert not rest.any(), name  # skip connections and text


# ------------------------------------------------------------------ exactly the base


@pytest.mark.parametrize("remember", [True, False], ids=["eval", "train"])
def test_zero_patch_and_strength_zero_are_the_base(tiny, remember):
    model = tiny.model()
    base = tiny.run(model)
    zero = tiny.patch(None, sites="all").train(not remember)
    patch = make(tiny, sites="all").train(not remember)
    with attach(model, zero):
        assert torch.equal(tiny.run(model), base)
        assert torch.equal(tiny.run(model), base)  # from the cache
    with attach(model, patch, strength=0.0):
        assert torch.equal(tiny.run(model), base)
    with attach(model, patch):
        assert not torch.equal(tiny.run(model), base)
    with attach(model, patch, strength=0.0, schedule=Schedule(curve=((0.0, 1.0),))):
        assert torch.equal(tiny.run(model), base)


def test_attach_then_remove_leaves_no_trace(tiny):
    model = tiny.model()
    model.enable_gradient_checkpointing()
    base, before = tiny.run(model), weights(model)
    shape, versions = structure(model), [p._version for p in model.parameters()]
    patch = make(tiny, sites="all")
    with attach(model, patch) as attachment:
        tiny.run(model).square().mean().backward()
        with torch.no_grad():
            tiny.run(model, size=(16, 16))
        assert attachment.calls == 2
        assert structure(model) != shape
    assert structure(model) == shape
    assert versions == [p._version for p in model.parameters()]
    assert same_weights(model, before)
    assert torch.equal(tiny.run(model), base)


def test_attached_model_has_the_state_dict_of_the_base(kind):
    model = kind.model()
    before = weights(model)
    with attach(model, make(kind, sites="all")):
        kind.run(model)
        assert same_weights(model, before)


@pytest.mark.parametrize("first_out", [0, 1])
def test_remove_is_idempotent_and_takes_only_its_own_patch(kind, first_out):
    model = kind.model()
    base, shape = kind.run(model), structure(model)
    patches = [make(kind, 1), make(kind, 2)]
    alone = []
    for patch in patches:
        with attach(model, patch):
            alone.append(kind.run(model))
    attachments = [attach(model, patch) for patch in patches]
    assert not torch.equal(kind.run(model), base)
    for _ in range(2):
        attachments[first_out].remove()
        assert torch.equal(kind.run(model), alone[1 - first_out])
    for _ in range(2):
        attachments[1 - first_out].remove()
        assert structure(model) == shape
        assert torch.equal(kind.run(model), base)


class Interrupted(BaseException):
    """As A1111's InterruptedException."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@some(*REPRESENTATIVES)
def test_error_inside_the_model(tiny, error):
    model = tiny.model()
    base, shape = tiny.run(model), structure(model)
    patch = make(tiny, sites="all")
    with attach(model, patch):
        patched = tiny.run(model)
    last = list(patch.sites.values())[-1]
    module = find_module(model, last.paths["diffusers"])

    def fail(module, args, output):
        raise error

    def failing_run():
        handle = module.register_forward_hook(fail)
        try:
            tiny.run(model)
        finally:
            handle.remove()

    with pytest.raises(error), attach(model, patch):
        failing_run()
    assert structure(model) == shape
    assert torch.equal(tiny.run(model), base)
    with attach(model, patch):
        with pytest.raises(error):
            failing_run()
        if error is RuntimeError:  # torch runs no hooks after an interrupt
            with pytest.raises(PatchError, match="outside of a forward call"):
                module(torch.zeros(1, 1))  # the failed call's context must not serve here
        assert torch.equal(tiny.run(model), patched)
    assert torch.equal(tiny.run(model), base)


# ------------------------------------------------------------------ what is added, and where


def test_each_site_alone_changes_the_output(tiny):
    model, patch = tiny.model(), make(tiny, sites="all")
    base = tiny.run(model)
    outputs = {}
    for name in patch.sites:
        with watched(model, patch, sites=[name]) as seen:
            outputs[name] = tiny.run(model)
        assert (outputs[name] - base).abs().max() > 1e-4, name
        changed = [n for n in patch.sites if not torch.equal(seen.before[n], seen.after[n])]
        assert changed == [name]
        # A patch of this site only keeps the site's depth.
        single = Patch.create(tiny.base, sites=[name]).eval()
        tensors = patch.tensors()
        single.load_tensors({k: tensors[k] for k in single.saved()})
        with attach(model, single):
            assert close(tiny.run(model), outputs[name], 1e-6), name
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs.values(), 2))


def test_changed_time_embedding_of_the_model_is_seen(kind):
    """The base is the caller's: a LoRA may be merged into it between two calls."""
    model, patch = kind.model(), make(kind)
    with attach(model, patch), torch.no_grad():
        kind.run(model)
        for module in model.modules():
            if type(module).__name__ == "TimestepEmbedding":
                module.linear_2.weight.mul_(-1.0)
        found = kind.run(model)
    with attach(model, copy.deepcopy(patch)), torch.no_grad():
        assert torch.equal(found, kind.run(model))


def test_replaced_time_embedding_of_the_model_is_seen():
    """New weights may get the addresses of the old ones."""
    model, twin, patch = DIT.model(), DIT.model(), make(DIT)
    layer, other = (m.transformer_blocks[0].norm1.emb.timestep_embedder for m in (model, twin))
    memory = layer.linear_2.weight.detach().clone().numpy()
    with attach(model, patch), torch.no_grad():
        for turn in range(3):
            memory *= -1.2
            layer.linear_2.weight = nn.Parameter(torch.from_numpy(memory))
            other.linear_2.weight.copy_(layer.linear_2.weight)
            found = DIT.run(model)
            with attach(twin, copy.deepcopy(patch)):
                assert torch.equal(found, DIT.run(twin)), turn


def test_sites_none_means_all_of_them(kind):
    model, patch = kind.model(), make(kind)
    with attach(model, patch):
        everything = kind.run(model)
    with attach(model, patch, sites=list(patch.sites)):
        assert torch.equal(kind.run(model), everything)
    with attach(model, patch, sites=[]):
        assert torch.equal(kind.run(model), kind.run(kind.model()))


@pytest.mark.parametrize(
    "latent", [(8, 8), (12, 12), (32, 32), (20, 12), (8, 40)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_fields_fit_any_resolution(tiny, latent):
    if tiny.square_only:
        latent = (max(latent), max(latent))
    model, patch = tiny.model(), make(tiny, sites="all")
    base = tiny.run(model, size=latent)
    with attach(model, tiny.patch(None, sites="all")):
        assert torch.equal(tiny.run(model, size=latent), base)
    with watched(model, patch, strength=0.75) as seen, torch.no_grad():
        first = tiny.run(model, size=latent)
        check_fields(tiny, patch, seen, latent, 0.75)
        assert torch.equal(tiny.run(model, size=latent), first)  # from the cache
    assert not torch.equal(first, base)


def test_sizes_with_as_many_tokens_are_told_apart(kind):
    model, patch = kind.model(), make(kind, sites="all")
    with torch.no_grad():
        for latent in ((8, 8),) if kind.square_only else ((8, 16), (16, 8), (8, 16), (4, 32)):
            with watched(model, patch) as seen:
                kind.run(model, size=latent)
            check_fields(kind, patch, seen, latent)


@pytest.mark.parametrize("latent", [(9, 7), (15, 17), (1, 1), (3, 8)])
@some(*UNETS)
def test_unets_take_odd_sizes(tiny, latent):
    model, patch = tiny.model(), make(tiny, sites="all")
    base = tiny.run(model, size=latent)
    with attach(model, tiny.patch(None, sites="all")):
        assert torch.equal(tiny.run(model, size=latent), base)
    with watched(model, patch) as seen:
        tiny.run(model, size=latent)
    check_fields(tiny, patch, seen, latent)


def test_negative_and_large_strength_scale_the_field(kind):
    model, patch = kind.model(), make(kind)
    for strength in (-1.5, 3.0):
        with watched(model, patch, strength=strength) as seen:
            kind.run(model)
        check_fields(kind, patch, seen, (8, 8), strength)


def test_two_patches_add(tiny):
    """Equal to one patch with the sum of the prompts: gates none, and gates equal."""
    model = tiny.model()
    for variant in ({"gate": "none", "sites": "all"}, {"sites": "all"}):
        first, second = make(tiny, 1, **variant), make(tiny, 2, **variant)
        if "gate" not in variant:
            second.gate.load_state_dict(first.gate.state_dict())
        both = copy.deepcopy(first)
        with torch.no_grad():
            for name in both.sites:
                both.pool(name).prompts.add_(second.pool(name).prompts)
            if "gate" in variant:  # N = 256 times what a gate passes
                for patch in (first, second, both):
                    for name in patch.sites:
                        patch.pool(name).prompts.div_(patch.variant.count)
        with attach(model, both):
            expected = tiny.run(model)
        with attach(model, first), attach(model, second):
            found = tiny.run(model)
        with attach(model, second), attach(model, first):
            swapped = tiny.run(model)
        with attach(model, first):
            assert not close(tiny.run(model), expected, 1e-2)
        assert close(found, expected)
        assert close(swapped, found)
        with attach(model, first, strength=0.5), attach(model, first, strength=0.5):
            halves = tiny.run(model)
        with attach(model, first):
            assert close(halves, tiny.run(model))


def test_unequal_timesteps_of_a_batch_equal_single_runs(tiny):
    model, patch = tiny.model(), make(tiny, sites="all")
    timesteps = [10.0, 900.0, 10.0, 500.0]
    inputs = tiny.inputs(torch.tensor(timesteps), (8, 8), torch.float32, 1)
    schedule = Schedule(first=950.0, last=100.0, curve=((0.0, 0.2), (1000.0, 1.4)))
    for train, settings in itertools.product((False, True), ({}, {"schedule": schedule})):
        patch.train(train)
        with attach(model, patch, **settings), torch.no_grad():
            batch = model(**inputs, return_dict=False)[0]
            singles = torch.cat(
                [model(**pick(inputs, [i], 4), return_dict=False)[0] for i in range(4)]
            )
            turned = model(**pick(inputs, [3, 2, 1, 0], 4), return_dict=False)[0]
        assert close(batch, singles)
        assert close(turned.flip(0), batch)
        assert not close(batch[0], batch[3], 1e-2)


def _rows_of_gate(patch: Patch, monkeypatch) -> list[int]:
    rows: list[int] = []
    logits = patch.gate.logits
    monkeypatch.setattr(
        patch.gate, "logits", lambda e, depths: rows.append(len(e)) or logits(e, depths)
    )
    return rows


def _rows_of_mix(monkeypatch) -> list[int]:
    rows: list[int] = []
    mix = PromptPool.mix
    monkeypatch.setattr(
        PromptPool, "mix", lambda self, weights: rows.append(len(weights)) or mix(self, weights)
    )
    return rows


def test_equal_timesteps_are_computed_once(kind, monkeypatch):
    model, patch = kind.model(), make(kind, grid=6)  # resized at every site
    gate, mix = _rows_of_gate(patch, monkeypatch), _rows_of_mix(monkeypatch)
    sites = len(patch.sites)
    with attach(model, patch), torch.no_grad():
        for timesteps, distinct in (([7.0, 7.0, 7.0], 1), ([7.0, 9.0, 7.0], 2)):
            kind.run(model, timesteps)
            assert gate == [distinct]
            assert mix == [distinct] * sites
            kind.run(model, timesteps, seed=3)  # remembered, whatever the picture
            assert gate == [distinct]
            assert mix == [distinct] * sites
            gate.clear()
            mix.clear()


@some(*UNETS)
def test_scalar_timestep(tiny):
    model, patch = tiny.model(), make(tiny)
    inputs = tiny.inputs(torch.tensor([500.0, 500.0]), (8, 8), torch.float32, 1)
    for schedule in (None, Schedule(first=600.0, curve=((0.0, 0.5),))):
        with attach(model, patch, schedule=schedule):
            expected = model(**inputs, return_dict=False)[0]
            for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500])):
                given = inputs | {"timestep": timestep}
                assert torch.equal(model(**given, return_dict=False)[0], expected)
                sample = given.pop("sample")
                given.pop("timestep")
                by_position = model(sample, timestep, **given, return_dict=False)[0]
                assert torch.equal(by_position, expected)


def test_arguments_by_position_and_by_name_are_the_same(kind):
    """Models and blocks may be called either way."""
    model, patch = kind.model(), make(kind)
    inputs = kind.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)
    order = {
        "unet": ("sample", "timestep", "encoder_hidden_states"),
        "dit": ("hidden_states", "timestep", "class_labels"),
        "pixart": ("hidden_states", "encoder_hidden_states", "timestep"),
        "sd3": ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        "flux": (
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
        ),
    }["unet" if kind in UNETS else "sd3" if kind.name == "sd35" else kind.name]
    schedule = Schedule(first=500.0)
    for variant in ({}, {"condition": "t+y"} if kind is DIT else {}):
        patch = make(kind, **variant)
        with attach(model, patch, schedule=schedule):
            by_name = model(**inputs, return_dict=False)[0]
            rest = {key: value for key, value in inputs.items() if key not in order}
            found = model(*(inputs[key] for key in order), **rest, return_dict=False)[0]
        assert torch.equal(found, by_name)


# ------------------------------------------------------------------ types and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_model_with_float32_patch(tiny, dtype):
    half = tiny.model(dtype=dtype)
    full = tiny.model(dtype=dtype).float()
    patch = make(tiny, sites="all")
    base, reference = base_output(tiny, half, dtype), tiny.run(full)
    assert base.dtype == dtype
    with attach(half, tiny.patch(None, sites="all")):
        assert torch.equal(tiny.run(half, dtype=dtype), base)
    with watched(half, patch) as seen, torch.no_grad():
        found = tiny.run(half, dtype=dtype)
        assert torch.equal(tiny.run(half, dtype=dtype), found)
    assert all(x.dtype == dtype for x in seen.after.values())
    with attach(full, patch):
        expected = tiny.run(full)
    assert found.dtype == dtype
    assert all(p.dtype == torch.float32 for p in patch.parameters())
    rounding = (base.float() - reference).abs().max()  # the model's own, without a patch
    assert (found.float() - expected).abs().max() < 4 * rounding + 1e-3
    assert not close(found.float(), base.float(), 0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@some(*REPRESENTATIVES)
def test_gradients_of_a_half_precision_model_arrive_in_float32(tiny, dtype):
    model, patch = tiny.model(dtype=dtype), make(tiny)
    full = tiny.model(dtype=dtype).float()
    base_output(tiny, model, dtype)
    found = gradients(tiny, model, patch, dtype=dtype)
    expected = gradients(tiny, full, patch)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        cosine = F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.97, name


@pytest.mark.parametrize("patch_dtype", [torch.bfloat16, torch.float64])
@some(*REPRESENTATIVES)
def test_patch_of_another_type(tiny, patch_dtype):
    model, patch = tiny.model(), make(tiny)
    rounded = copy.deepcopy(patch).to(patch_dtype).float()
    with attach(model, rounded):
        expected = tiny.run(model)
    with attach(model, patch.to(patch_dtype)):
        assert close(tiny.run(model), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Flux's own norm
@some(*REPRESENTATIVES)
def test_autocast(tiny):
    model, patch = tiny.model(), make(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        base = base_output(tiny, model, torch.float32)
    with attach(model, patch):
        expected = tiny.run(model)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                found = tiny.run(model)
            tiny.run(model).float().square().mean().backward()
    with attach(model, tiny.patch(None)), torch.autocast("cpu", torch.bfloat16):
        zero = tiny.run(model)
    assert torch.equal(zero, base)
    assert close(found.float(), expected, 0.1)
    assert all(p.grad is not None and p.grad.any() for p in patch.parameters())


@some(*UNETS)
def test_channels_last(tiny):
    model, patch = tiny.model(), make(tiny, sites="all")
    with attach(model, patch), torch.no_grad():
        expected = tiny.run(model)
    model.to(memory_format=torch.channels_last)
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    base = model(**inputs, return_dict=False)[0]
    with attach(model, tiny.patch(None, sites="all")):
        assert torch.equal(model(**inputs, return_dict=False)[0], base)
    with watched(model, patch) as seen, torch.no_grad():  # the patch remembers the other layout
        found = model(**inputs, return_dict=False)[0]
    assert close(found, expected)
    for name, x in seen.before.items():
        assert seen.after[name].stride() == x.stride(), name


# ------------------------------------------------------------------ the cache


def test_inference_mode_then_gradients(kind):
    """What inference mode left in the caches serves training, and the other way round."""
    model, patch = kind.model(), make(kind, sites="all")
    fresh = gradients(kind, model, copy.deepcopy(patch))
    frozen = copy.deepcopy(patch).requires_grad_(False)
    with attach(model, patch), attach(model, frozen, strength=-0.5):
        with torch.inference_mode():
            expected = kind.run(model).clone()
        assert torch.equal(kind.run(model), expected)
        with torch.no_grad():
            assert torch.equal(kind.run(model), expected)
        with torch.inference_mode():
            assert torch.equal(kind.run(model), expected)
    for value, gradient in gradients(kind, model, patch).items():
        assert close(gradient, fresh[value])
    # Gradients with respect to the picture, through remembered fields.
    inputs = kind.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)
    name = next(iter(inputs))
    inputs[name].requires_grad_()
    found = []
    for warm in (False, True):
        other = copy.deepcopy(frozen)
        with attach(model, other):
            if warm:
                with torch.inference_mode():
                    kind.run(model)
                assert len(other.cache) > 0
            model(**inputs, return_dict=False)[0].square().sum().backward()
        found.append(inputs[name].grad)
        inputs[name].grad = None
    assert torch.equal(*found)
    assert found[0].any()


@some(*REPRESENTATIVES)
def test_patch_made_in_inference_mode(tiny):
    model = tiny.model()
    with attach(model, make(tiny)):
        expected = tiny.run(model)
    with torch.inference_mode():
        patch = make(tiny)
        with attach(model, patch):
            assert torch.equal(tiny.run(model), expected)
            patch.pool(next(iter(patch.sites))).prompts.mul_(2)
            changed = tiny.run(model)
        assert not torch.equal(changed, expected)
    with attach(model, copy.deepcopy(patch)):
        assert torch.equal(tiny.run(model), changed)


def _step(patch: Patch, tiny: Tiny, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(patch.parameters(), lr=0.1)
    with torch.enable_grad():
        tiny.run(model).square().mean().backward()
    optimizer.step()


def _add(patch: Patch, *_: object) -> None:
    with torch.no_grad():
        patch.pool(list(patch.sites)[-1]).prompts.mul_(-2.0)


def _gate(patch: Patch, *_: object) -> None:
    with torch.no_grad():
        patch.gate.bias[0] += 3.0


def _load(patch: Patch, *_: object) -> None:
    patch.load_tensors({name: value * 1.5 for name, value in patch.tensors().items()})


def _state(patch: Patch, *_: object) -> None:
    patch.load_state_dict({name: value * 1.5 for name, value in patch.state_dict().items()})


def _vector(patch: Patch, *_: object) -> None:
    vector = nn.utils.parameters_to_vector(patch.parameters()).detach()
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.copy_(vector[: parameter.numel()].view_as(parameter) * 1.1)
            vector = vector[parameter.numel() :]


def _inference(patch: Patch, *_: object) -> None:
    with torch.inference_mode():
        patch.gate.weight.mul_(-1.0)


@pytest.mark.parametrize("change", [_add, _gate, _step, _load, _state, _vector, _inference])
def test_change_in_place_between_two_forwards_is_seen(tiny, change: Callable):
    model, patch = tiny.model(), make(tiny)
    for learns in (True, False) if change is not _step else (True,):
        patch.requires_grad_(learns)
        with attach(model, patch), torch.no_grad():
            old = tiny.run(model)
            assert len(patch.cache) > 0
            change(patch, tiny, model)
            new = tiny.run(model)
        with attach(model, copy.deepcopy(patch)), torch.no_grad():
            expected = tiny.run(model)
        assert torch.equal(new, expected)
        assert not torch.equal(new, old)


def test_gradients_switched_on_and_off_between_forwards(kind):
    model, patch = kind.model(), make(kind).requires_grad_(False)
    with attach(model, patch):
        expected = kind.run(model)
        assert len(patch.cache) > 0
        assert not expected.requires_grad
        patch.requires_grad_(True)
        output = kind.run(model)
        assert close(output, expected, 1e-6)
        output.square().mean().backward()
        assert all(p.grad.any() for p in patch.parameters())
        patch.requires_grad_(False)
        assert torch.equal(kind.run(model), expected)


@pytest.mark.parametrize("name", ["prompts", "weight"])
@some(SD15, DIT)
def test_replaced_parameter_is_seen(tiny, name):
    """A new tensor may get the address of one that was freed, as CUDA's allocator often does."""
    model, patch = tiny.model(), make(tiny)
    owner = patch.gate if name == "weight" else patch.pool(next(iter(patch.sites)))
    memory = getattr(owner, name).detach().clone().numpy()
    with attach(model, patch), torch.no_grad():
        for turn in range(3):
            memory *= -1.5
            setattr(owner, name, nn.Parameter(torch.from_numpy(memory)))
            assert torch.equal(tiny.run(model), _alone(tiny, copy.deepcopy(patch))), turn


def test_assigned_and_converted_states_are_seen():
    model, patch = DIT.model(), make(DIT)
    states = [make(DIT, seed).state_dict() for seed in range(3)]
    with attach(model, patch), torch.no_grad():
        for turn in range(6):
            values = {name: value.clone() for name, value in states[turn % 3].items()}
            patch.load_state_dict(values, assign=True)
            del values
            assert torch.equal(DIT.run(model), _alone(DIT, copy.deepcopy(patch))), turn
            patch.bfloat16().float()
            assert torch.equal(DIT.run(model), _alone(DIT, copy.deepcopy(patch))), turn


def _alone(tiny: Tiny, patch: Patch) -> Tensor:
    """Output of a fresh model with this patch, without gradients."""
    model = tiny.model()
    with attach(model, patch), torch.no_grad():
        return tiny.run(model)


@some(*REPRESENTATIVES)
def test_scale_for_learning_is_no_change(tiny):
    model, patch = tiny.model(), make(tiny)
    with attach(model, patch), torch.no_grad():
        expected = tiny.run(model)
        patch.scale_for_learning()
        assert close(tiny.run(model), expected, 1e-6)


def test_cache_limit_is_respected_and_changes_nothing(kind):
    model, patch = kind.model(), make(kind)
    none, small = copy.deepcopy(patch), copy.deepcopy(patch)
    none.cache.limit = 0
    steps = [[t, t] for t in (999.0, 700.0, 400.0, 100.0, 700.0, 999.0)]
    outputs = []
    for each in (patch, none, small):
        small.cache.limit = patch.cache.bytes // 2
        with attach(model, each), torch.no_grad():
            run = []
            for step in steps:
                run.append(kind.run(model, step))
                held = sum(value.nbytes for value in each.cache._fields.values())
                assert held == each.cache.bytes <= each.cache.limit
        outputs.append(run)
    assert len(none.cache) == 0
    assert 0 < len(small.cache) < len(patch.cache)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*outputs, strict=True))
    patch.cache.clear()
    assert len(patch.cache) == patch.cache.bytes == 0


def test_cached_tensors_are_not_what_blocks_may_write_to(kind):
    """Some host code writes into the stream in place; a remembered field must survive it."""
    model, patch = kind.model(), make(kind, sites="all")
    with attach(model, patch), torch.no_grad():
        expected = kind.run(model)
        handles = []
        for site in patch.sites.values():
            key = site.arguments["diffusers"]

            def write(module, args, kwargs, key=key):
                x = args[key.index] if len(args) > key.index else kwargs[key.name]
                x.mul_(0.0)

            module = find_module(model, site.paths["diffusers"])
            handles.append(module.register_forward_pre_hook(write, with_kwargs=True))
        kind.run(model)
        for handle in handles:
            handle.remove()
        assert torch.equal(kind.run(model), expected)


# ------------------------------------------------------------------ settings and schedule


def test_settings_changed_between_calls_are_not_stale(kind):
    model, patch = kind.model(), make(kind)
    names = list(patch.sites)
    choices = [
        Settings(),
        Settings(strength=0.5),
        Settings(temperature=3.0),
        Settings(sites=frozenset(names[1:])),
        Settings(sites=frozenset(names[:1])),
        Settings(schedule=Schedule(first=500.0)),
        Settings(schedule=Schedule(curve=((0.0, 1.0), (1000.0, 0.0)))),
        Settings(),
    ]
    with attach(model, patch) as attachment, torch.no_grad():
        found = []
        for attachment.settings in choices:
            found.append(kind.run(model))
    assert torch.equal(found[0], found[-1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found[:-1], 2))
    for settings, output in zip(choices, found, strict=True):
        fresh = copy.deepcopy(patch)
        fresh.cache.limit = 0
        with attach(
            model,
            fresh,
            strength=settings.strength,
            schedule=settings.schedule,
            temperature=settings.temperature,
            sites=settings.sites,
        ):
            assert close(kind.run(model), output, 1e-6)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_schedule_factor_is_applied_item_by_item(kind, train):
    model, patch = kind.model(), make(kind, sites="all").train(train)
    timesteps = [950.0, 700.0, 300.0, 20.0]
    schedule = Schedule(first=900.0, last=100.0, curve=((100.0, 0.0), (700.0, 1.5)))
    factors = [0.0, 1.5, 0.5, 0.0]
    base = kind.run(model, timesteps)
    with watched(model, patch, strength=0.8, schedule=schedule) as seen:
        output = kind.run(model, timesteps)
    for name in patch.sites:
        added = seen.after[name] - seen.before[name]
        e = seen.e[0]
        if patch.base.layout == "map":
            own = added[:, : patch.sites[name].width]
            field = plain_field(patch, name, e, tuple(own.shape[2:]))
        else:
            own = added[:, -16:]
            field = plain_field(patch, name, e, (4, 4)).flatten(2).transpose(1, 2)
        for item, factor in enumerate(factors):
            assert (own[item] - 0.8 * factor * field[item]).abs().max() < 2e-5
    assert torch.equal(output[[0, 3]], base[[0, 3]])
    assert not close(output[1], base[1], 1e-2)
    assert not close(output[2], base[2], 1e-2)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_schedule_ends_are_inside(kind, train):
    model, patch = kind.model(), make(kind).train(train)
    for t in (0.0, 137.0, 900.0, 999.0, 1000.0):
        base = kind.run(model, [t, t])
        with attach(model, patch):
            full = kind.run(model, [t, t])
        for schedule, acts in (
            (Schedule(first=t), True),
            (Schedule(last=t), True),
            (Schedule(first=t, last=t), True),
            (Schedule(first=t - 0.5), False),
            (Schedule(last=t + 0.5), False),
        ):
            with attach(model, patch, schedule=schedule):
                assert torch.equal(kind.run(model, [t, t]), full if acts else base), (t, schedule)


def test_schedule_outside_of_its_range_costs_no_field(kind, monkeypatch):
    model, patch = kind.model(), make(kind, grid=6)
    mix = _rows_of_mix(monkeypatch)
    with attach(model, patch, schedule=Schedule(first=500.0)), torch.no_grad():
        base = kind.run(kind.model(), [800.0, 900.0])
        assert torch.equal(kind.run(model, [800.0, 900.0]), base)
        assert mix == []
        kind.run(model, [300.0, 200.0])
        assert len(mix) == len(patch.sites)


# ------------------------------------------------------------------ gradients


def gradients(
    tiny: Tiny,
    model: nn.Module,
    *patches: Patch,
    dtype: torch.dtype = torch.float32,
    attached: bool = False,
    prepare: Callable[[], None] = lambda: None,
    between: bool = False,
) -> dict[str, Tensor]:
    """Gradients of a loss with respect to the patches' parameters, and the loss itself."""
    attachments = [] if attached else [attach(model, patch) for patch in patches]
    prepare()
    for patch in patches:
        patch.zero_grad(set_to_none=True)
    loss = tiny.run(model, dtype=dtype).float().square().mean()
    if between:
        tiny.run(model, [333.0, 666.0], dtype=dtype, seed=7)
        with torch.no_grad():
            tiny.run(model, [5.0], size=(16, 16), dtype=dtype, seed=8)
    loss.backward()
    for attachment in attachments:
        attachment.remove()
    found = {
        f"{index}.{name}": parameter.grad
        for index, patch in enumerate(patches)
        for name, parameter in patch.named_parameters()
    }
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    return found | {"loss": loss.detach()[None]}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert close(found[name], expected[name], 1e-6), name


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_second_forward_before_backward(tiny, train):
    model, patch = tiny.model(), make(tiny, sites="all").train(train)
    same_gradients(gradients(tiny, model, patch, between=True), gradients(tiny, model, patch))


@some(SD15, DIT)
def test_gradients_are_the_derivative(tiny):
    """Central differences along a random direction, in a float64 model."""
    model, patch = tiny.model(dtype=torch.float64), make(tiny, sites="all")
    found = gradients(tiny, model, patch, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)

    def loss(sign: float) -> float:
        moved = copy.deepcopy(patch)
        generator.manual_seed(3)
        with torch.no_grad():
            for parameter in moved.parameters():
                scale = parameter.std()
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(sign * 1e-3 * scale * step)
        with attach(model, moved), torch.no_grad():
            return tiny.run(model, dtype=torch.float64).square().mean().item()

    expected = (loss(1.0) - loss(-1.0)) / 2e-3
    generator.manual_seed(3)
    slope = sum(
        (found[f"0.{name}"] * torch.randn(p.shape, generator=generator) * p.std()).sum().item()
        for name, p in patch.named_parameters()
    )
    assert slope == pytest.approx(expected, rel=1e-2, abs=1e-5)


@contextmanager
def counted(tiny: Tiny, model: nn.Module) -> Iterator[list[int]]:
    """How often a checkpointed block runs; twice when it is recomputed."""
    path = list(make(tiny).sites.values())[0].paths["diffusers"]
    calls: list[int] = []
    handle = find_module(model, path).register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("when", ["before", "after", "between-patches"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, when):
    """Enabled before or after attaching; with a second forward before backward and without."""
    model = tiny.model()
    patches = [make(tiny, 1, sites="all").train(when != "after")]
    if when == "between-patches":
        patches.append(make(tiny, 2))
    expected = gradients(tiny, model, *patches)
    if when == "before":
        checkpoint(model)
    attachments = [attach(model, patches[0])]
    if when != "before":
        checkpoint(model)
    attachments += [attach(model, patch) for patch in patches[1:]]
    with counted(tiny, model) as calls:
        found = gradients(tiny, model, *patches, attached=True, between=True)
    assert len(calls) == 4, "three forwards, and one block recomputed"
    same_gradients(found, expected)
    same_gradients(gradients(tiny, model, *patches, attached=True), expected)
    attachments[0].remove()
    attachments[0].remove()
    if len(patches) == 2:
        alone = gradients(tiny, model, patches[1], attached=True, between=True)
        attachments[1].remove()
        same_gradients(alone, gradients(tiny, tiny.model(), patches[1]))
    model.disable_gradient_checkpointing()
    assert torch.equal(tiny.run(model), tiny.run(tiny.model()))


@some(*REPRESENTATIVES)
def test_checkpointing_of_a_schedule_and_of_prompt_tuning(tiny):
    schedule = Schedule(curve=((0.0, 0.3), (1000.0, 1.0)))
    for variant in ({"gate": "none"}, {"gate": "attention"}, {"selection": "hard"}):
        patch = make(tiny, std=0.01 if variant == {"gate": "none"} else 0.5, **variant)
        found = []
        for checkpointing in (False, True):
            model = tiny.model()
            if checkpointing:
                checkpoint(model)
            with attach(model, patch, schedule=schedule):
                found.append(gradients(tiny, model, patch, attached=True, between=checkpointing))
        same_gradients(*found)


@some(*REPRESENTATIVES)
def test_backward_after_remove_is_right_or_refused(tiny):
    """Recomputation without the patch would give other activations than the forward had."""
    model, patch = tiny.model(), make(tiny, sites="all")
    expected = gradients(tiny, model, patch)
    checkpoint(model)
    patch.zero_grad(set_to_none=True)
    with attach(model, patch):
        loss = tiny.run(model).square().mean()
    try:
        loss.backward()
    except (PatchError, torch.utils.checkpoint.CheckpointError):
        return
    for name, parameter in patch.named_parameters():
        assert close(parameter.grad, expected[f"0.{name}"], 1e-6), name


@some(FAMILIES["pixart"], FLUX)
def test_checkpointing_by_any_diffusers_is_right_or_refused(tiny):
    """Before 0.33 the recomputation cannot be told its timestep: an error, never a wrong gradient.

    Old releases checkpoint in training mode only.
    """
    model, patch = tiny.model().train(), make(tiny, sites="all")
    expected = gradients(tiny, model, patch)
    model.enable_gradient_checkpointing()
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        same_gradients(gradients(tiny, model, patch, between=True), expected)
    else:
        with pytest.raises(PatchError, match="outside of a forward call"):
            gradients(tiny, model, patch, between=True)


def test_checkpointing_function_of_the_user_is_given_back(kind):
    model, patch = kind.model(), make(kind)
    calls = []

    def own(module, *args):
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    expected = gradients(kind, model, patch)
    checkpoint(model)
    model.enable_gradient_checkpointing(gradient_checkpointing_func=own)
    same_gradients(gradients(kind, model, patch, between=True), expected)
    assert calls
    parts = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert parts
    assert all(m._gradient_checkpointing_func is own for m in parts)


# ------------------------------------------------------------------ torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _small_unet() -> Tiny:
    """Two levels, one layer: compiling takes seconds."""
    widths, attention = (16, 32), (True, False)
    base = dmp.register_base(
        dmp.families.unet("tiny-compile", widths=widths, context=12, attention=attention, layers=1)
    )

    def build() -> nn.Module:
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            norm_num_groups=8,
            attention_head_dim=4,
        )

    return dataclasses.replace(SD15, name="unet", base=base, build=build)


# Older compilers do not know all that hooks do; they fall back to several graphs.
ONE_GRAPH = torch.__version__ >= (2, 4)
COMPILED = [_small_unet(), *(FAMILIES[n] for n in ("dit", "sd3", "flux"))]


def check_compiled(tiny: Tiny, backend: str, fullgraph: bool, size: tuple[int, int]) -> None:
    model, patch = tiny.model(), make(tiny, sites="all")
    base = tiny.run(model, size=size)
    other = dict(timesteps=(500.0, 20.0), size=size, seed=4)
    schedule = Schedule(first=950.0, curve=((0.0, 0.4), (1000.0, 1.2)))
    with attach(model, patch, strength=0.7, schedule=schedule), torch.no_grad():
        expected, second = tiny.run(model, size=size), tiny.run(model, **other)
    attachment = attach(model, patch, strength=0.7, schedule=schedule)
    compiled = torch.compile(model, dynamic=False, fullgraph=fullgraph, backend=backend)
    with torch.no_grad():
        assert close(tiny.run(compiled, size=size), expected)
        assert close(tiny.run(compiled, **other), second)  # the graph holds no weights of a step
        with torch.no_grad():
            patch.pool(next(iter(patch.sites))).prompts.mul_(-2.0)
        with_change = tiny.run(compiled, **other)
        assert close(with_change, _eager(tiny, patch, other, schedule))
        assert not close(with_change, second, 1e-3)
        attachment.remove()
        assert close(tiny.run(compiled, size=size), base)
        assert torch.equal(tiny.run(model, size=size), base)


def _eager(tiny: Tiny, patch: Patch, run: dict, schedule: Schedule) -> Tensor:
    model = tiny.model()
    with attach(model, copy.deepcopy(patch), strength=0.7, schedule=schedule):
        return tiny.run(model, **run)


@pytest.mark.slow
@some(*COMPILED)
def test_compile_after_attach(tiny, dynamo):
    check_compiled(tiny, "aot_eager", fullgraph=ONE_GRAPH and tiny is not FLUX, size=(8, 8))


def _shallow_dit() -> Tiny:
    base = dmp.register_base(
        dmp.families.dit("tiny-inductor", depth=1, width=32, patch_size=2, frequency_shift=1.0)
    )

    def build() -> nn.Module:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )

    return dataclasses.replace(DIT, name="shallow-dit", base=base, build=build)


@pytest.mark.slow
def test_compile_with_the_default_backend(dynamo):
    """One block: nearly all of the time is the C++ compiler's."""
    tiny = _shallow_dit()
    model, patch = tiny.model(), make(tiny)
    with attach(model, patch), torch.no_grad():
        expected = tiny.run(model)
        compiled = torch.compile(model, dynamic=False, fullgraph=ONE_GRAPH)
        assert close(tiny.run(compiled), expected)


@pytest.mark.slow
@some(DIT)
def test_gradients_of_a_compiled_model(tiny, dynamo):
    model, patch = tiny.model(), make(tiny, sites="all").train()
    expected = gradients(tiny, model, patch)
    with attach(model, patch):
        compiled = torch.compile(model, dynamic=False, backend="aot_eager", fullgraph=ONE_GRAPH)
        same_gradients(gradients(tiny, compiled, patch, attached=True), expected)


@some(DIT)
def test_compiled_blocks_after_attach(tiny, dynamo):
    """Compiling block by block, as diffusers' `compile_repeated_blocks` does."""
    model, patch = tiny.model(), make(tiny)
    with attach(model, patch), torch.no_grad():
        expected = tiny.run(model)
        for block in model.transformer_blocks:
            block.compile(backend="eager", dynamic=False)
        assert close(tiny.run(model), expected)


@some(DIT)
def test_attach_to_a_compiled_model_is_refused(tiny, dynamo):
    model, patch = tiny.model(), make(tiny)
    compiled = torch.compile(model, backend="eager")
    for target in (compiled, SimpleNamespace(transformer=compiled)):
        with pytest.raises(PatchError, match="attach the patch first, then compile"):
            attach(target, patch)
    in_place = tiny.model()
    in_place.compile(backend="eager")
    with pytest.raises(PatchError, match="attach the patch first, then compile"):
        attach(in_place, patch)


@some(DIT)
def test_attach_to_compiled_blocks_acts_or_is_refused(tiny, dynamo):
    """A hook on a block that is compiled already is ignored without a word."""
    model, patch = tiny.model(), make(tiny)
    expected = _alone(tiny, patch)
    for block in model.transformer_blocks:
        block.compile(backend="eager", dynamic=False)
    with torch.no_grad():
        tiny.run(model)
        try:
            attachment = attach(model, patch)
        except PatchError as error:
            assert "compile" in str(error)
            return
        assert close(tiny.run(model), expected)
        attachment.remove()


# ------------------------------------------------------------------ refused


def test_block_called_outside_of_the_model(kind):
    model, patch = kind.model(), make(kind, sites="all")
    with attach(model, patch):
        for phase in range(2):
            for name, site in patch.sites.items():
                module = find_module(model, site.paths["diffusers"])
                with pytest.raises(PatchError, match=f"{name} was called outside"):
                    module(torch.zeros(1, 4, 4))
            if phase == 0:
                kind.run(model)  # its context must be gone afterwards


def test_patch_for_another_base(tiny):
    model = tiny.model()
    shape = structure(model)
    for other in FAMILIES.values():
        if other is tiny:
            continue
        with pytest.raises(PatchError) as error:
            attach(model, make(other))
        assert f"patch is for base {other.base.name}" in str(error.value)
        assert f"model of base {tiny.base.name}" in str(error.value)
    assert structure(model) == shape


def test_patch_for_no_base_of_this_model():
    with pytest.raises(PatchError, match=r"for base tiny-dit, and found Linear \(no module"):
        attach(nn.Linear(2, 2), make(DIT))
    for nothing in ("a string", None, 3, {}):
        with pytest.raises(PatchError, match="expected a diffusion model or pipeline"):
            attach(nothing, make(DIT))


@pytest.mark.parametrize("bad", [{"sites": ["nowhere"]}, {"strength": float("nan")}])
def test_refused_settings_leave_no_hook(kind, bad):
    model = kind.model()
    shape = structure(model)
    with pytest.raises(PatchError, match="expected"):
        attach(model, make(kind), **bad)
    assert structure(model) == shape


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": float("inf")},
        {"strength": 1e9},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(PatchError, match="expected a"):
        Settings(**settings)


def test_wrong_frequency_shift(tiny):
    model = tiny.model()
    shape = structure(model)
    own = tiny.base.frequency_shift
    with pytest.raises(PatchError, match=f"shift {1 - own:g}, and the model has {own:g}"):
        attach(model, make(tiny, frequency_shift=1 - own))
    assert structure(model) == shape
    for module in model.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 1 - own
    with pytest.raises(PatchError, match="frequency shift"):
        attach(model, make(tiny))
    with attach(model, make(tiny, frequency_shift=1 - own)):
        tiny.run(model)


def test_pipeline_with_another_prediction_type():
    def pipe(scheduler):
        return SimpleNamespace(unet=SD15.model(), scheduler=scheduler)

    epsilon = diffusers.DDIMScheduler()
    v = diffusers.DDIMScheduler(prediction_type="v_prediction")
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    attach(pipe(epsilon), make(SD15))
    attach(pipe(v), make(SD15, prediction="v_prediction"))
    for scheduler, found in ((v, "v_prediction"), (flow, "flow")):
        with pytest.raises(PatchError, match=f"type epsilon, and this pipeline has {found}"):
            attach(pipe(scheduler), make(SD15))
    with pytest.raises(PatchError, match="type v_prediction, and this pipeline has epsilon"):
        attach(pipe(epsilon), make(SD15, prediction="v_prediction"))
    # A bare model does not know; the caller does.
    attach(pipe(v).unet, make(SD15))

    def transformer(scheduler):
        return SimpleNamespace(transformer=FLUX.model(), scheduler=scheduler)

    attach(transformer(flow), make(FLUX))
    if "use_flow_sigmas" in inspect.signature(diffusers.DPMSolverMultistepScheduler).parameters:
        solver = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        )
        attach(transformer(solver), make(FLUX))
    with pytest.raises(PatchError, match="type flow, and this pipeline has epsilon"):
        attach(transformer(epsilon), make(FLUX))


def test_a_real_pipeline():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4
        ).eval()
    model = DIT.model()
    model.register_to_config(out_channels=4)  # None would be resolved in a released model's file
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    patch = make(DIT)

    def picture() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipe(
                [1, 2],
                guidance_scale=1.0,
                generator=generator,
                num_inference_steps=3,
                output_type="np",
            ).images
        )

    base = picture()
    with attach(pipe, patch) as attachment:
        patched = picture()
        assert attachment.calls == 3
    with attach(pipe, patch, schedule=Schedule(first=400.0)) as attachment:
        late = picture()
    assert torch.equal(picture(), base)
    assert not torch.equal(patched, base)
    assert not torch.equal(late, base)
    assert not torch.equal(late, patched)


def test_shapes_that_cannot_be_a_site(kind):
    patch = make(kind, sites="all")
    e = torch.randn(2, kind.base.embedding)
    context = patch.prepare(e, (8, 8))
    name, site = next(iter(patch.sites.items()))
    if patch.base.layout == "map":
        good, wrong = (2, site.width, 8, 8), [(2, site.width - 1, 8, 8), (2, site.width, 8)]
    else:
        good = (2, 16, site.width)
        wrong = [(2, 15, site.width), (2, 16, site.width + 1), (2, 16, 4, 4)]
        if not patch.base.positions:
            wrong.append((2, 17, site.width))
    assert context.add(name, torch.zeros(good)).any()
    for shape in wrong:
        with pytest.raises(PatchError, match=f"site {name} expected an input of shape"):
            context.add(name, torch.zeros(shape))
    with pytest.raises(PatchError, match="expected a batch of 2 items"):
        context.add(name, torch.zeros(3, *good[1:]))
    with pytest.raises(PatchError, match=r"time embedding \(B, "):
        patch.prepare(torch.zeros(2, kind.base.embedding + 1), (8, 8))
    with pytest.raises(PatchError, match="expected a time embedding"):
        patch.prepare(torch.zeros(kind.base.embedding), (8, 8))
    with pytest.raises(PatchError, match="a schedule needs the timesteps"):
        patch.prepare(e, (8, 8), Settings(schedule=Schedule(first=3.0)))
    with pytest.raises(PatchError, match="expected sites of this patch"):
        patch.prepare(e, (8, 8), Settings(sites=frozenset(["nowhere"])))
    if patch.base.layout == "tokens":
        with pytest.raises(PatchError, match="size of the latent"):
            patch.prepare(e, None).add(name, torch.zeros(good))


def test_one_time_embedding_serves_a_whole_batch(kind):
    """Hosts may give one row for all items."""
    patch = make(kind)
    e = torch.randn(1, kind.base.embedding)
    name, site = next(iter(patch.sites.items()))
    shape = (3, site.width, 8, 8) if patch.base.layout == "map" else (3, 16, site.width)
    x = torch.randn(shape)
    one = patch.prepare(e, (8, 8)).add(name, x)
    assert close(one, patch.prepare(e.expand(3, -1), (8, 8)).add(name, x), 1e-6)
    assert not close(one, x, 1e-2)


def test_context_changes_nothing_in_place(kind):
    patch = make(kind, sites="all")
    context = patch.prepare(torch.randn(2, kind.base.embedding), (8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.strength = 2.0
    for name, site in patch.sites.items():
        shape = (2, site.width + 3, 8, 8) if patch.base.layout == "map" else (2, 16, site.width)
        x = torch.randn(shape)
        kept = x.clone()
        first = context.add(name, x)
        assert torch.equal(x, kept)
        assert first.data_ptr() != x.data_ptr()
        assert torch.equal(context.add(name, x), first)
    inactive = patch.prepare(
        torch.randn(2, kind.base.embedding), (8, 8), Settings(sites=frozenset([name]))
    )
    other = next(iter(patch.sites))
    assert inactive.add(other, x) is x
    assert inactive.add("no site of the patch", x) is x


# ------------------------------------------------------------------ text and reference tokens


def test_kontext_reference_tokens_are_left_alone():
    """FLUX Kontext appends the tokens of a reference picture, whose first position id is 1."""
    tiny, model, patch = FLUX, FLUX.model(), make(FLUX, sites="all")
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 12), torch.float32, 1)
    own = inputs["hidden_states"].shape[1]
    assert own == 24
    generator = torch.Generator().manual_seed(4)
    reference = torch.randn(2, 16, 16, generator=generator)
    ids = tiny.inputs(torch.tensor([1.0]), (8, 8), torch.float32, 1)["img_ids"].clone()
    ids[:, 0] = 1
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], reference], dim=1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], ids])
    base = model(**inputs, return_dict=False)[0]
    with watched(model, patch) as seen:
        output = model(**inputs, return_dict=False)[0]
    assert not torch.equal(output[:, :own], base[:, :own])
    for name in patch.sites:
        added = (seen.after[name] - seen.before[name])[:, -(own + 16) :]
        expected = plain_field(patch, name, seen.e[0], (4, 6)).flatten(2).transpose(1, 2)
        assert (added[:, :own] - expected).abs().max() < 2e-5
        assert not added[:, own:].any()
        text = (seen.after[name] - seen.before[name])[:, : -(own + 16)]
        assert not text.any()


@pytest.mark.parametrize("references", [0, 9])
def test_text_before_the_image_tokens_is_left_alone(references):
    """ComfyUI's single blocks get [text; image; references] in one sequence."""
    patch = make(FLUX, sites="all")
    e = torch.randn(2, FLUX.base.embedding)
    tokens = 24 + references if references else None
    context = patch.prepare(e, (8, 12), image_tokens=tokens)
    for name in patch.sites:
        for text in (0, 5):
            x = torch.randn(2, text + 24 + references, 32)
            added = context.add(name, x) - x
            expected = plain_field(patch, name, e, (4, 6)).flatten(2).transpose(1, 2)
            assert not added[:, :text].any()
            assert (added[:, text : text + 24] - expected).abs().max() < 2e-5
            assert not added[:, text + 24 :].any()


@pytest.mark.parametrize("name", ["pixart", "sd3", "sd35", "dit"])
@pytest.mark.parametrize("padded", [False, True])
def test_incomplete_tokens_at_the_edge(name, padded):
    """An odd latent: diffusers drops the incomplete token, ComfyUI pads it to a whole one."""
    tiny = FAMILIES[name]
    patch = make(tiny)
    site = next(iter(patch.sites))
    e = torch.randn(1, tiny.base.embedding)
    for latent in ((9, 8), (8, 11), (9, 13)):
        grid = tuple((side + padded) // 2 for side in latent)
        x = torch.zeros(1, grid[0] * grid[1], 32)
        added = patch.prepare(e, latent).add(site, x)
        expected = plain_field(patch, site, e, grid).flatten(2).transpose(1, 2)
        assert (added - expected).abs().max() < 2e-5


@pytest.mark.parametrize("text", [0, 5])
def test_incomplete_tokens_at_the_edge_of_flux(text):
    """ComfyUI pads an odd latent: 9 x 8 gives 5 x 4 tokens."""
    patch = make(FLUX)
    e = torch.randn(1, FLUX.base.embedding)
    expected = plain_field(patch, "single.0", e, (5, 4)).flatten(2).transpose(1, 2)
    for image_tokens, references in ((20, 0), (None, 0), (29, 9)):
        x = torch.zeros(1, text + 20 + references, 32)
        added = patch.prepare(e, (9, 8), image_tokens=image_tokens).add("single.0", x)
        assert not added[:, :text].any()
        assert (added[:, text : text + 20] - expected).abs().max() < 2e-5
        assert not added[:, text + 20 :].any()


# ------------------------------------------------------------------ prepended prompts


def test_prepended_prompts_act_on_dit():
    tiny, model = DIT, DIT.model()
    patch = make(tiny, std=0.05, mix="prepend")
    assert all(pool.prompts.shape == (1, 50, 32) for pool in patch.pools.values())
    base = tiny.run(model)
    lengths = []
    handles = [
        block.attn1.register_forward_pre_hook(
            lambda m, args, kwargs: lengths.append((args + tuple(kwargs.values()))[0].shape[1]),
            with_kwargs=True,
        )
        for block in model.transformer_blocks
    ]
    with attach(model, patch):
        patched = tiny.run(model)
    for handle in handles:
        handle.remove()
    assert lengths == [66, 66, 66]  # 50 prompts and 16 tokens, each block anew
    assert patched.shape == base.shape
    assert not close(patched, base, 1e-3)
    with attach(model, patch, sites=["block.1"]):
        assert not torch.equal(tiny.run(model), base)
    assert torch.equal(tiny.run(model), base)
    found = gradients(tiny, model, patch, between=True)
    checkpoint(model)
    same_gradients(gradients(tiny, model, patch, between=True), found)


def test_prepended_prompts_equal_a_plain_restatement():
    tiny, model = DIT, DIT.model()
    patch = make(tiny, std=0.05, mix="prepend")
    with attach(model, patch, strength=0.5):
        found = tiny.run(model)
    es: list[Tensor] = []
    mlp = model.transformer_blocks[0].norm1.emb.timestep_embedder
    handles = [mlp.register_forward_hook(lambda m, a, out: es.append(out))]
    tiny.run(model)

    def before(depth):
        def hook(module, args, kwargs):
            inputs = torch.cat([es[0], torch.full((2, 1), float(depth))], dim=1)
            w = (inputs @ patch.gate.weight.T + patch.gate.bias).softmax(-1)
            prompts = 0.5 * w[..., None] * patch.pools[f"block_{depth}"].prompts[0]
            return (torch.cat([prompts, args[0]], dim=1), *args[1:]), kwargs

        return hook

    for depth, block in enumerate(model.transformer_blocks):
        handles.append(block.register_forward_pre_hook(before(depth), with_kwargs=True))
        handles.append(block.register_forward_hook(lambda m, a, out: out[:, 50:]))
    assert close(found, tiny.run(model))
    for handle in handles:
        handle.remove()


def test_prepended_prompts_at_strength_zero_are_the_base():
    model, patch = DIT.model(), make(DIT, std=0.05, mix="prepend")
    base = DIT.run(model)
    with attach(model, patch, strength=0.0):
        assert torch.equal(DIT.run(model), base)
    with attach(model, patch, schedule=Schedule(first=5.0)):
        assert torch.equal(DIT.run(model), base)


def test_hosts_refuse_prepended_prompts():
    patch = make(DIT, mix="prepend")
    context = patch.prepare(torch.randn(1, 32), (8, 8))
    with pytest.raises(PatchError, match="prepends its prompts"):
        context.add("block.0", torch.zeros(1, 16, 32))


# ------------------------------------------------------------------ copies and devices


def _pickled(patch: Patch) -> Patch:
    return pickle.loads(pickle.dumps(patch))


def _torch_saved(patch: Patch) -> Patch:
    file = io.BytesIO()
    torch.save(patch, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, _pickled, _torch_saved])
@some(*REPRESENTATIVES)
def test_copies_are_equal_and_independent(tiny, clone):
    model, patch = tiny.model(), make(tiny, sites="all")
    patch.metadata = {"ss_note": "kept"}
    patch.scale_for_learning()
    next(patch.parameters()).requires_grad_(False)
    patch.cache.limit = 12345678
    expected = _alone(tiny, patch)
    random = torch.get_rng_state()
    other = clone(patch)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(other.cache) == 0
    assert other.cache.limit == 12345678
    assert other.metadata == patch.metadata
    assert other.variant == patch.variant
    assert other.training is False
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in patch.parameters()
    ]
    for name, value in patch.tensors().items():
        assert torch.equal(other.tensors()[name], value)
    with attach(model, other), torch.no_grad():
        assert torch.equal(tiny.run(model), expected)
        for parameter in other.parameters():
            parameter.mul_(2.0)
        other.metadata["ss_note"] = "changed"
        assert not torch.equal(tiny.run(model), expected)
    assert torch.equal(_alone(tiny, patch), expected)
    assert patch.metadata == {"ss_note": "kept"}


def test_copy_of_a_module_that_holds_a_patch_and_of_a_training_patch():
    patch = make(DIT).train()
    holder = nn.ModuleDict({"a": patch, "b": patch})
    other = copy.deepcopy(holder)
    assert other["a"] is other["b"] is not patch
    assert other["a"].training
    state = patch.state_dict()
    assert all(torch.equal(other["a"].state_dict()[k], state[k]) for k in state)


def test_patch_on_another_device_than_the_model(kind):
    """The meta device stands for another one: shapes are right, and changes are followed."""
    patch = make(kind)
    name, site = next(iter(patch.sites.items()))
    shape = (2, site.width, 8, 8) if patch.base.layout == "map" else (2, 16, site.width)
    e = torch.randn(2, kind.base.embedding, device="meta")
    x = torch.zeros(shape, device="meta")
    added = patch.prepare(e, (8, 8)).add(name, x)
    assert added.shape == x.shape
    assert added.device.type == "meta"
    with pytest.raises(PatchError, match=r"patch is on cpu and the model on meta.*move the patch"):
        patch.train().prepare(e, (8, 8))


def test_patch_of_inference_tensors_on_another_device():
    with torch.inference_mode():
        patch = make(DIT)
        patch.prepare(torch.randn(2, 32, device="meta"), (8, 8))


def test_change_of_inference_tensors_is_seen_on_another_device():
    """They do not count their changes."""
    with torch.inference_mode():
        patch = make(DIT)
        first = patch._replica(torch.device("cpu")).gate.weight.clone()
        patch.gate.weight.mul_(2.0)
        assert torch.equal(patch._replica(torch.device("cpu")).gate.weight, 2.0 * first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_patch_on_the_cpu_model_on_the_gpu(kind):
    expected = _alone(kind, make(kind))
    model, patch = kind.model().cuda(), make(kind)

    def run() -> Tensor:
        inputs = kind.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)

        def move(value):
            if isinstance(value, dict):
                return {key: move(each) for key, each in value.items()}
            return value.cuda() if isinstance(value, Tensor) else value

        return model(**move(inputs), return_dict=False)[0].cpu()

    with attach(model, patch), torch.no_grad():
        assert close(run(), expected, 1e-3)
        with torch.inference_mode():
            run()
        _add(patch)
        changed = run()
        assert not close(changed, expected, 1e-3)
    assert close(changed, _alone(kind, patch), 1e-3)
    assert all(p.device.type == "cpu" for p in patch.parameters())
