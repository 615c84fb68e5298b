"""What the tests of attaching a patch share: families, patches, plain restatements."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import diffusers
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dmp_common as dmp
from dmp_common import Patch, attach
from dmp_common.attach.forms import as_tokens
from dmp_common.bases.base import find_module
from dmp_common.patch.prompts import PromptPool
from tests.tiny import FAMILIES, Tiny

UNETS = [FAMILIES[name] for name in ("sd15", "sd21", "sdxl")]
DIT, FLUX, SD15 = FAMILIES["dit"], FAMILIES["flux"], FAMILIES["sd15"]
REPRESENTATIVES = [SD15, DIT, FLUX]  # map; tokens with e inside; tokens packed with text


# sd21 and sd35 differ from sd15 and sd3 in how they are recognised only: enough of them in the
# tests that name every family.
KINDS = [family for name, family in FAMILIES.items() if name not in ("sd21", "sd35")]


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


def site_shape(base: dmp.Base, site: dmp.Site, count: int) -> tuple[int, ...]:
    """Shape of the first site's input for latents of 8 x 8."""
    if base.layout == "map":
        return (count, site.width, 8, 8)
    return (count, (8 // site.stride) ** 2, site.width)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to `tolerance` of the largest value."""
    scale = expected.abs().max().item()
    return (found - expected).abs().max().item() <= tolerance * max(scale, 1e-3)


def small_unet() -> Tiny:
    """Two levels, one layer: compiling takes seconds."""
    widths, attention = (16, 32), (True, False)
    base = dmp.register_base(
        dmp.bases.unet("tiny-compile", widths=widths, context=12, attention=attention, layers=1)
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


def base_output(tiny: Tiny, model: nn.Module, dtype: torch.dtype) -> Tensor:
    """The model's output, where this release of torch can compute it on a CPU at all."""
    try:
        return tiny.run(model, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"the model itself cannot: {error}")


def checkpoint(model: nn.Module) -> None:
    """Enables gradient checkpointing, where diffusers has it in the form that can be bound."""
    enable_checkpointing(model)
    if not any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        pytest.skip("diffusers before 0.33 checkpoints otherwise, which is refused (see below)")


def enable_checkpointing(model: nn.Module) -> None:
    """Enables it with a function that takes keywords: diffusers' own takes none, and some of its
    models pass them."""
    enable = model.enable_gradient_checkpointing
    if "gradient_checkpointing_func" in inspect.signature(enable).parameters:
        enable(partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
    else:
        enable()


def structure(model: nn.Module) -> dict[str, dict[str, object]]:
    """Every attribute of every module: dictionaries and lists by content, the rest by identity."""

    def content(value: object) -> object:
        if type(value) in (dict, OrderedDict):
            return list(value.items()) if value else ()  # most are empty
        return [id(part) for part in value] if type(value) is list else id(value)

    return {
        name: {key: content(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)


def pick(inputs: dict, rows: list[int], batch: int) -> dict:
    """Items of a batch; position ids are those of all items."""

    def some_of(key: str, value: object) -> object:
        if isinstance(value, dict):
            return pick(value, rows, batch)
        if isinstance(value, list):
            return [value[row] for row in rows]
        shared = (
            value is None or len(value) != batch or (key.endswith("_ids") and key != "time_ids")
        )
        return value if shared else value[rows]

    return {key: some_of(key, value) for key, value in inputs.items()}


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
            x = as_tokens(x, site.forms.get("diffusers"))
            store[site.name] = x.clone(memory_format=torch.preserve_format)

        module = find_module(model, site.paths["diffusers"])
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    sites = patch.sites.values()
    source = patch.base.times["diffusers"]
    mlp = find_module(model, source.mlp)
    handles = [watch(seen.before, site) for site in sites]
    handles.append(
        mlp.register_forward_hook(lambda m, args, out: seen.e.append(source.embedding(out)))
    )
    with attach(model, patch, **settings):
        handles += [watch(seen.after, site) for site in sites]
        yield seen
    for handle in handles:
        handle.remove()


def split_tokens(tiny: Tiny, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The image tokens (B, tokens, D) of sequences, and all others."""
    inside = torch.zeros(values.shape[:2], dtype=torch.bool)
    for item, start in enumerate(tiny.starts(len(values), values.shape[1], tokens)):
        inside[item, start : start + tokens] = True
    return values[inside].reshape(len(values), tokens, -1), values[~inside]


def check_fields(tiny: Tiny, patch: Patch, seen: Seen, latent: tuple[int, int], strength=1.0):
    """What arrived at each block is what the model gave plus the plain field, nowhere else."""
    assert set(seen.before) == set(seen.after) == set(patch.sites)
    for name, site in patch.sites.items():
        before, after = seen.before[name], seen.after[name]
        e = seen.e[0][: len(before)]  # some models embed timestep 0 after those of the items
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
            tokens = tiny.frames * size[0] * size[1]
            own, rest = split_tokens(tiny, added, tokens)
            x = split_tokens(tiny, before, tokens)[0]
            expected = plain_field(patch, name, e, size).flatten(2).transpose(1, 2)
            expected = expected.repeat(1, tiny.frames, 1)
        assert expected.abs().max() > 0.01
        assert is_field(own, x, strength * expected), name
        assert not rest.any(), name  # skip connections and text


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


def add_in_place(patch: Patch, *_: object) -> None:
    with torch.no_grad():
        patch.pool(list(patch.sites)[-1]).prompts.mul_(-2.0)


def alone(tiny: Tiny, patch: Patch) -> Tensor:
    """Output of a fresh model with this patch, without gradients."""
    model = tiny.model()
    with attach(model, patch), torch.no_grad():
        return tiny.run(model)


def rows_of_mix(monkeypatch) -> list[int]:
    rows: list[int] = []
    mix = PromptPool.mix
    monkeypatch.setattr(
        PromptPool, "mix", lambda self, weights: rows.append(len(weights)) or mix(self, weights)
    )
    return rows
