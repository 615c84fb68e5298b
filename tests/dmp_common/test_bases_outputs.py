"""The bases: outputs of modules, which a modulating patch scales and shifts."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from diffusers.loaders import single_file_utils as single_file

from dmp_common import Base, PatchError, bases, get_base, known_bases
from dmp_common.attach.modulation import parts_of
from dmp_common.bases.base import find_module
from tests.dmp_common.originalnames import Asked, original_names, original_shapes
from tests.dmp_common.realbases import ALL, MODELS, model_of
from tests.dmp_common.test_bases_names import ORIGINAL, official_dit, official_pixart
from tests.tiny import FAMILIES

TINY = pytest.mark.parametrize("tiny", FAMILIES.values(), ids=FAMILIES)
LAYERS = (nn.Linear, nn.Conv2d)


BLOCKS = re.compile(
    r"^(\w+_blocks|blocks|layers|\w+_refiner|[\w.]+\.refiner_blocks)\.\d+\.|^mid_block\."
)


def layers_in_blocks(model: nn.Module) -> set[str]:
    """Paths of the linear layers and convolutions of blocks; DiT's embed the time in each block."""
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, LAYERS) and BLOCKS.match(path) and ".emb." not in path
    }


@ALL
def test_outputs_are_the_layers_of_the_model(name):
    """Every linear layer and convolution of the blocks is a site, but for the text's last ones."""
    model, base = model_of(name), get_base(MODELS[name].base)
    paths = [site.paths["diffusers"] for site in base.outputs]
    for site in base.outputs:
        module = find_module(model, site.paths["diffusers"])
        assert isinstance(module, LAYERS), site.name
        width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        assert width == site.width, site.name
        assert site.axis == (-1 if isinstance(module, nn.Linear) else 1), site.name
        assert (site.place, site.stride, site.starts.get("diffusers", 0)) == ("output", 1, 0)
    assert len(set(paths)) == len(paths) == len(set(base.output_depths))
    left = layers_in_blocks(model) - set(paths)
    block = f"transformer_blocks.{len(base.sites) - 1}"
    assert left == {f"{block}.{end}" for end in MODELS[name].dead}
    modulation = base.output_sets.get("modulation", ())
    for site in base.outputs:
        assert BLOCKS.match(site.paths["diffusers"]) or site.name in modulation, site.name


@ORIGINAL
def test_ldm_paths_of_outputs(name):
    """The original parameters at (path, start) are those of diffusers' layer: by its converters."""
    names, shapes = original_names(name), original_shapes(name)
    base = get_base(MODELS[name].base)
    known = {site.name: site for site in base.outputs}
    for path, parts in parts_of(base.outputs, "ldm").items():
        end = 0
        for name, start, _ in parts:
            site = known[name]
            assert names[f"{site.paths['diffusers']}.weight"] == f"{path}.weight", site.name
            end = max(end, start + site.width)
        assert end == shapes[f"{path}.weight"][0], path


class Numbered(Asked):
    """A checkpoint whose tensors hold the number of each row, and that of the tensor before it."""

    def pop(self, name: str) -> torch.Tensor:
        rows = super().pop(name).shape[0]
        column = torch.arange(rows, dtype=torch.float64) / 2**20 + len(self.names) - 1
        return column[:, None]


@pytest.mark.parametrize("name", ["flux-schnell", "sd35-medium"])
def test_channels_of_fused_layers_keep_their_order(name):
    """diffusers' converter splits the fused layers at our starts, and modulations stay in order."""
    base, shapes = get_base(MODELS[name].base), original_shapes(name)
    blocks = {".".join(key.split(".")[:2]) for key in shapes if "_blocks." in key}
    known = {f"{block}.x": None for block in blocks}
    known |= {f"joint_blocks.{n}.x_block.attn2.x": None for n in range(13) if "sd35" in name}
    known["joint_blocks.0.x_block.attn.ln_q.x"] = None
    known["context_embedder.weight"] = torch.zeros(base.embedding, 1)
    checkpoint = Numbered(known, lambda key: shapes[key][0])
    kind = "flux" if base.name == "flux" else "sd3"
    convert = getattr(single_file, f"convert_{kind}_transformer_checkpoint_to_diffusers")
    converted = convert(checkpoint)
    for site in base.outputs:
        here = converted[f"{site.paths['diffusers']}.weight"].flatten()
        tensor = checkpoint.names.index(f"{site.paths['ldm']}.weight")
        rows = site.starts.get("ldm", 0) + torch.arange(site.width, dtype=torch.float64)
        assert torch.equal(here, rows / 2**20 + tensor), site.name


@pytest.mark.parametrize("name", ["dit-xl/2", "pixart"])
def test_outputs_fill_the_layers_of_the_original_files(name):
    """No converter of these is in diffusers; ComfyUI's classes prove the order of the channels."""
    shapes = official_dit(28, 1152, 2) if name == "dit-xl/2" else official_pixart(False)
    outputs = get_base(name).outputs
    widths = {site.name: site.width for site in outputs}
    parts = parts_of(outputs, "ldm")
    blocks = {key for key, shape in shapes.items() if key.startswith("blocks.") and len(shape) == 2}
    weights = {f"{path}.weight" for path in parts}
    tables = {key for key in blocks if key.endswith("scale_shift_table")}
    assert weights - {"t_block.1.weight"} == {key for key in blocks if key.endswith("weight")}
    assert blocks - tables <= weights
    for path, sites in parts.items():
        ends = [0, *(part.start + widths[part.site] for part in sites)]
        assert [part.start for part in sites] == ends[:-1], path
        assert ends[-1] == shapes[f"{path}.weight"][0], path


@TINY
def test_every_output_acts_on_the_picture(tiny):
    """A layer whose output reached no image token would get no gradient.

    The latent leaves more than one token in the lowest block: over one alone attention is constant.
    A channel is judged by itself: linear attention divides a factor of all keys out again.
    """
    model = tiny.model()
    changes = {}
    for site in tiny.base.outputs:
        module = find_module(model, site.paths["diffusers"])

        def change(module, args, out, name=site.name):
            changes[name] = torch.zeros_like(out, requires_grad=True)
            return out + changes[name]

        module.register_forward_hook(change)
    tiny.run(model, size=(16, 16)).square().sum().backward()
    sizes = {name: 0.0 if c.grad is None else float(c.grad.norm()) for name, c in changes.items()}
    assert set(sizes) == {site.name for site in tiny.base.outputs}
    dead = [name for name, size in sizes.items() if size < 1e-6 * max(sizes.values())]
    assert dead == []


def test_named_choices_of_outputs():
    for base in known_bases():
        sets = {name: set(base.output_sets[name]) for name in base.output_sets}
        without = base.name.endswith(("chroma", "qwen-image-2.1"))
        assert ("modulation" in sets) is not without
        modulation = sets.get("modulation", set())
        assert sets["linear"] and all(sets.values())
        assert sets["linear"] | modulation == sets["modulated"]
        assert not sets["linear"] & modulation
        assert base.default_outputs == "linear"
        convolves = any(site.axis == 1 for site in base.outputs)
        largest = "outputs" if convolves else "modulated"
        assert sets[largest] == set(base.output_depths)
        assert list(sets)[-1] == largest
        chosen = base.select("linear", "output")
        assert [site.name for site in chosen] == [
            n for n in base.output_depths if n in sets["linear"]
        ]
    digits = get_base("digits")
    assert [site.name for site in digits.select(7, "output")] == [
        *("block.0.mod", "block.0.to_q", "block.0.to_k", "block.0.to_v", "block.0.to_out"),
        *("block.0.ff.in", "block.0.ff.out"),
    ]
    assert digits.select(["block.5.ff.out"], "output")[0].width == 64


@pytest.mark.parametrize(
    ("base", "choice", "parameters"),
    [
        *(("digits", "linear", 27_648), ("digits", "modulated", 46_080)),
        *(("digits", "modulation", 18_432), ("sd15", "modulation", 161_280)),
        *(("dit-b/2", "linear", 663_552), ("sd15", "linear", 1_697_280)),
        *(("sd15", "modulated", 1_858_560), ("sd15", "outputs", 2_524_160)),
        *(("sdxl", "linear", 11_489_280), ("flux", "linear", 15_876_096)),
        ("sd3", "linear", 5_222_400),
    ],
)
def test_parameters_of_four_scales_and_shifts(base, choice, parameters):
    chosen = get_base(base).select(choice, "output")
    assert 4 * 2 * sum(site.width for site in chosen) == parameters


def test_bases_without_outputs_and_wrong_choices():
    plain = replace(get_base("sd15"), name="plain", outputs=(), output_sets={})
    with pytest.raises(PatchError, match="no output sites"):
        plain.select("linear", "output")
    sdxl = get_base("sdxl")
    for choice in ("encoder", 0, 789, ["in.1"], [], ["in.1.time"] * 2):
        with pytest.raises(PatchError, match="base sdxl") as error:
            sdxl.select(choice, "output")
        assert len(str(error.value)) < 4000
    with pytest.raises(PatchError, match="no site set 'linear'"):
        sdxl.select("linear")


def test_outputs_are_made_when_they_are_first_read():
    calls: list[int] = []
    sites = get_base("digits").outputs

    def make():
        calls.append(1)
        return sites

    base: Base = replace(get_base("digits"), name="lazy", outputs=make)
    assert calls == []
    assert base.depths == get_base("digits").depths
    assert calls == []
    assert base.outputs is sites
    assert base.outputs is sites
    assert calls == [1]
    row = bases.flux("mine", double=1, single=1, width=32)
    assert (
        pickle.loads(pickle.dumps(row)) == row == bases.flux("mine", double=1, single=1, width=32)
    )
    assert replace(row, name="other").outputs == row.outputs
