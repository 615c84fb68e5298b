"""The bases: original names by diffusers."""

from __future__ import annotations

import types

import pytest
import torch.nn as nn

from dmp_common import detect_base, get_base, known_bases
from dmp_common.bases.base import find_module
from dmp_common.bases.detect import naming_of, namings_of
from dmp_common.bases.timesteps import frequency_shift
from tests.dmp_common.originalnames import original_names, original_shapes
from tests.dmp_common.realbases import MODELS, meta, model_of, seen

# Without those whose original names diffusers does not convert, or that are its own.
CONVERTED = [
    name
    for name, real in MODELS.items()
    if "ldm" in namings_of(get_base(real.base))
    and not any(part in name for part in ("dit", "pixart", "qwen", "ernie"))
]
ORIGINAL = pytest.mark.parametrize("name", CONVERTED)


@ORIGINAL
def test_original_names_are_complete(name):
    """Every parameter of the diffusers model has one, so the map is the real model's."""
    names = original_names(name)
    assert set(names) == set(model_of(name).state_dict())
    assert None not in names.values()


def _under(names: dict[str, str], path: str) -> set[str]:
    return {original for key, original in names.items() if key.startswith(f"{path}.")}


@ORIGINAL
def test_ldm_paths_hold_the_parameters_of_the_diffusers_paths(name):
    names, base = original_names(name), get_base(MODELS[name].base)
    for site in base.sites:
        here, there = site.paths["diffusers"], site.paths["ldm"]
        expected = {v for v in names.values() if v.startswith(f"{there}.")}
        assert expected, site.name
        assert _under(names, here) == expected, site.name
    times = base.times
    for part in ("mlp", "path"):
        expected = {v for v in names.values() if v.startswith(f"{getattr(times['ldm'], part)}.")}
        assert _under(names, getattr(times["diffusers"], part)) == expected != set()


def tree(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Modules with these parameters: what a model of a host looks like to a path and a probe."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, owner, parameter = f"root.{name}".split(".")
        module = root
        for part in path[1:]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if owner == "root":
            module = root
        elif owner not in module._modules:
            if parameter == "weight" and len(shape) == 4:
                leaf = nn.Conv2d(shape[1], shape[0], shape[2:], device="meta")
            elif parameter == "weight" and len(shape) == 2:
                leaf = nn.Linear(shape[1], shape[0], device="meta")
            else:
                leaf = nn.Module()
            module.add_module(owner, leaf)
            module = leaf
        else:
            module = module._modules[owner]
        if parameter not in module._parameters:
            module.register_parameter(parameter, nn.Parameter(meta(*shape)))
    return root


@ORIGINAL
def test_original_naming_is_detected(name):
    model, expected = tree(original_shapes(name)), MODELS[name].base
    assert detect_base(model).name == expected
    matching = {base.name: naming_of(model, base) for base in known_bases()}
    assert {k: v for k, v in matching.items() if v} == {expected: "ldm"}
    holders = (
        types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=model)),
        types.SimpleNamespace(diffusion_model=model),
    )
    for holder in holders:
        assert detect_base(holder).name == expected


class Stored(nn.Module):
    """A layer that does not state its features, as Forge's for GGUF and nf4 do not."""

    def __init__(self, weight: nn.Parameter, in_a_column: bool) -> None:
        super().__init__()
        self.weight = weight
        if in_a_column:  # bitsandbytes: two values in a byte, and the shape in a state
            self.weight = nn.Parameter(meta(weight.numel() // 2, 1))
            self.weight.quant_state = types.SimpleNamespace(shape=weight.shape)


@pytest.mark.parametrize("in_a_column", [False, True], ids=["gguf", "nf4"])
@pytest.mark.parametrize("name", [n for n in ("sd15", "sdxl", "flux-dev", "sd3") if n in MODELS])
def test_layers_that_do_not_state_their_features(name, in_a_column):
    model = tree(original_shapes(name))
    for path, module in [*model.named_modules()]:
        if type(module) is nn.Linear:
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, Stored(module.weight, in_a_column))
    assert detect_base(model).name == MODELS[name].base


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_original_unet_widths(name):
    """From the first layer's own parameters: the norm sees the stream and the skip connection."""
    shapes, base = original_shapes(name), get_base(name)
    for site in base.sites:
        path = site.paths["ldm"]
        first = shapes.get(f"{path}.in_layers.0.weight") or shapes[f"{path}.op.weight"][1:2]
        assert first == (site.width + seen(name).skips.get(site.name, 0),), site.name


def official_pixart(alpha: bool) -> dict[str, tuple[int, ...]]:
    """Parameters of the released PixArt-XL-2 checkpoints (scripts/convert_pixart_*.py)."""
    d = 1152
    shapes = {
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.2.weight": (d, d),
        "t_block.1.weight": (6 * d, d),
        "y_embedder.y_embedding": (120, 4096),
        "y_embedder.y_proj.fc1.weight": (d, 4096),
        "y_embedder.y_proj.fc2.weight": (d, d),
        "final_layer.linear.weight": (32, d),
        "final_layer.scale_shift_table": (2, d),
    }
    if alpha:
        shapes |= {f"{n}_embedder.mlp.0.weight": (d // 3, 256) for n in ("csize", "ar")}
    for n in range(28):
        block = {
            "scale_shift_table": (6, d),
            "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d),
            "cross_attn.q_linear.weight": (d, d),
            "cross_attn.kv_linear.weight": (2 * d, d),
            "cross_attn.proj.weight": (d, d),
            "mlp.fc1.weight": (4 * d, d),
            "mlp.fc2.weight": (d, 4 * d),
        }
        shapes |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    return shapes


def official_dit(depth: int, d: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Parameters of the released DiT checkpoints (facebookresearch/DiT, models.py)."""
    shapes = {
        "pos_embed": (1, (32 // patch) ** 2, d),
        "x_embedder.proj.weight": (d, 4, patch, patch),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.2.weight": (d, d),
        "y_embedder.embedding_table.weight": (1001, d),
        "final_layer.linear.weight": (8 * patch**2, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
    }
    for n in range(depth):
        block = {
            "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d),
            "mlp.fc1.weight": (4 * d, d),
            "mlp.fc2.weight": (d, 4 * d),
            "adaLN_modulation.1.weight": (6 * d, d),
        }
        shapes |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    return shapes


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (official_pixart(alpha=True), "pixart"),
        (official_pixart(alpha=False), "pixart"),
        *(
            (official_dit(depth, width, patch), f"dit-{size}/{patch}")
            for size, depth, width in (
                *(("s", 12, 384), ("b", 12, 768)),
                *(("l", 24, 1024), ("xl", 28, 1152)),
            )
            for patch in (2, 4, 8)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_original_names_without_a_converter_in_diffusers(shapes, expected):
    model = tree(shapes)
    matching = {base.name: naming_of(model, base) for base in known_bases()}
    assert {k: v for k, v in matching.items() if v} == {expected: "ldm"}
    base = get_base(expected)
    assert find_module(model, base.times["ldm"].path) is not None
    assert find_module(model, base.times["ldm"].mlp)._modules["0"].in_features == base.sinusoid
    for site in base.sites:
        module = find_module(model, site.paths["ldm"])
        assert module.attn.proj.in_features == site.width
    assert frequency_shift(model, base, "ldm") == 0.0
