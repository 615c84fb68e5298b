"""The patch beside what else ComfyUI's users do to a model, with ComfyUI's own nodes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dmp_common import PatchError

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

SIGMAS = torch.tensor([2.0, 2.0])


@pytest.fixture
def sd15(real):
    return real.FAMILIES["sd15"]


@pytest.fixture
def node(comfyui_path) -> Callable[..., Any]:
    """Runs a node of ComfyUI's own on a model: node("file.Class", model, ...)."""

    def call(name: str, *args: Any) -> Any:
        file, cls = name.split(".")
        module = importlib.import_module(f"comfy_extras.{file}")
        node = getattr(module, cls)
        if hasattr(node, "execute"):
            return node.execute(*args)[0]
        return getattr(node(), node.FUNCTION)(*args)[0]

    return call


def shrink(node: Callable[..., Any], model: Any, after_skip: bool) -> Any:
    return node(
        "nodes_model_downscale.PatchModelAddDownscale",
        *(model, 3, 2.0, 0.0, 1.0, after_skip, "bicubic", "bicubic"),
    )


OTHERS: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "freeu": lambda node, m: node("nodes_freelunch.FreeU_V2", m, 1.3, 1.4, 0.9, 0.2),
    "deep shrink": lambda node, m: shrink(node, m, True),
    "deep shrink before skip": lambda node, m: shrink(node, m, False),
    "hypertile": lambda node, m: node("nodes_hypertile.HyperTile", m, 64, 2, 0, False),
    "perturbed": lambda node, m: node("nodes_pag.PerturbedAttentionGuidance", m, 3.0),
}


@pytest.mark.parametrize("other", OTHERS)
def test_node_order_does_not_matter(sd15, run, host, node, other):
    record = run.record(sd15.patch(sites="all", std=0.2))
    plain = sd15.comfy()
    before = OTHERS[other](node, host.attach(plain, record))
    after = host.attach(OTHERS[other](node, plain), record)
    torch.manual_seed(0)
    one = run.call(before, sd15, SIGMAS)
    torch.manual_seed(0)
    assert torch.equal(one, run.call(after, sd15, SIGMAS))
    torch.manual_seed(0)
    alone = run.call(OTHERS[other](node, plain), sd15, SIGMAS)
    assert not torch.allclose(one, alone)
    zero = host.attach(OTHERS[other](node, plain), run.record(sd15.patch(None)))
    torch.manual_seed(0)
    assert torch.equal(run.call(zero, sd15, SIGMAS), alone)


def test_weight_patches_in_either_order(sd15, run, host):
    """A LoRA changes weights, among them those of the time embedding."""
    names = ["time_embed.0.weight", "input_blocks.1.0.in_layers.2.weight"]
    plain = sd15.comfy()
    weights = dict(plain.model.diffusion_model.named_parameters())
    lora = {
        f"diffusion_model.{name}": ("diff", (torch.randn_like(weights[name]) * 0.1,))
        for name in names
    }
    record = run.record(sd15.patch(sites="all"))
    before = host.attach(plain, record)
    before.add_patches(lora)
    with_lora = plain.clone()
    with_lora.add_patches(lora)
    after = host.attach(with_lora, record)
    one, two, alone = (run.sample(m, sd15) for m in (before, after, with_lora))
    assert torch.equal(one, two)
    assert not torch.allclose(one, alone)
    assert not torch.allclose(one, run.sample(host.attach(plain, record), sd15))


def test_skipped_layers_get_no_prompts(real, run, host, node):
    """Skip-layer guidance replaces a block; a prompt at the input of a skipped block is gone."""
    family = real.FAMILIES["sd3"]
    import comfy.model_patcher

    plain = family.comfy()
    record = run.record(family.patch(sites=["joint.1"]))

    def skip(model: Any) -> Any:
        model = model.clone()
        comfy.model_patcher.set_model_options_patch_replace(
            model.model_options, lambda args, extra: args, "dit", "double_block", 1
        )
        model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
        return model

    sigmas = torch.tensor([0.5])
    alone = run.call(skip(plain), family, sigmas)
    assert torch.equal(run.call(skip(host.attach(plain, record)), family, sigmas), alone)
    assert torch.equal(run.call(host.attach(skip(plain), record), family, sigmas), alone)
    assert not torch.allclose(run.call(plain, family, sigmas), alone)


def test_controlnet_residuals(sd15, run, host):
    """They go to the same streams; the patch adds to them and changes none of them."""
    plain = sd15.comfy()
    patched = host.attach(plain, run.record(sd15.patch(None, sites="all")))
    shapes = [(32, 16, 8)] * 3 + [(32, 8, 4)] + [(64, 8, 4)] * 2
    controls = {"output": [torch.randn(2, *shape) for shape in shapes], "middle": [None]}
    residuals = [tensor.clone() for tensor in controls["output"]]

    def control() -> dict[str, list[Any]]:
        return {kind: list(tensors) for kind, tensors in controls.items()}

    alone = run.call(plain, sd15, SIGMAS, control=control())
    assert torch.equal(run.call(patched, sd15, SIGMAS, control=control()), alone)
    for mine, theirs in zip(controls["output"], residuals, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_low_precision_weights(real, run, host, name, dtype):
    """Stored in few bits and cast at use, as ComfyUI does it on a CPU."""
    family = real.FAMILIES[name]
    plain = family.comfy(dtype=dtype)
    record = run.record(family.patch(sites="all", std=0.1))
    sigmas = torch.tensor([0.5, 0.5])
    out = run.call(host.attach(plain, record), family, sigmas)
    alone = run.call(plain, family, sigmas)
    assert out.isfinite().all()
    assert not torch.allclose(out, alone)
    zero = host.attach(plain, run.record(family.patch(None)))
    assert torch.equal(run.call(zero, family, sigmas), alone)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "pixart"])
def test_partial_loading(real, run, host, name):
    """Part of the weights stays offloaded and is cast at use, as with little memory."""
    family = real.FAMILIES[name]
    patcher = host.attach(family.comfy(), run.record(family.patch(sites="all", std=0.1)))
    sigmas = torch.tensor([0.5, 0.5])
    whole = run.call(patcher, family, sigmas)
    patcher.load(torch.device("cpu"), lowvram_model_memory=patcher.model_size() // 3)
    assert patcher.model.model_lowvram
    torch.testing.assert_close(run.call(patcher, family, sigmas), whole)
    patcher.detach()
    torch.testing.assert_close(run.call(patcher, family, sigmas), whole)


def test_unloading_gives_memory_back(sd15, run, host):
    patcher = sd15.comfy()
    record = run.record(sd15.patch(sites="all"))
    patched = host.attach(patcher, record)
    one = run.sample(patched, sd15)
    cache = record.loaded.patch.cache
    assert cache.bytes > 0
    patched.detach(unpatch_all=False)  # another clone takes over
    assert cache.bytes > 0
    patched.detach()
    assert cache.bytes == 0
    assert torch.equal(run.sample(patched, sd15), one)


def test_inpainting_unet(sd15, run, host):
    """Nine channels go in; the first site comes after the first convolution."""
    import comfy.model_base

    family = sd15
    config = importlib.import_module("comfy.supported_models").SD15({**family.unet})
    config.unet_config["in_channels"] = 9
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    assert isinstance(model, comfy.model_base.BaseModel)
    cpu = torch.device("cpu")
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher(model, cpu, cpu)
    randomised = importlib.import_module("tests.comfyui_dmp.real").randomised
    randomised(model.diffusion_model)
    patched = host.attach(patcher, run.record(family.patch(sites="all")))
    extra = {"c_concat": torch.randn(2, 5, 16, 8)}
    out = run.call(patched, family, SIGMAS, **extra)
    assert not torch.allclose(out, run.call(patcher, family, SIGMAS, **extra))


def test_other_samplings_after_attaching(sd15, run, host, node):
    """A sampling node behind ours is seen when the model is called."""
    patched = host.attach(sd15.comfy(), run.record(sd15.patch(), start=0.2))
    name = "nodes_model_advanced.ModelSamplingDiscrete"
    changed = node(name, patched, "v_prediction", False)
    with pytest.raises(PatchError, match="prediction type epsilon, found v_prediction"):
        run.call(changed, sd15, SIGMAS)
    run.call(node(name, patched, "eps", True), sd15, SIGMAS)
    name = "nodes_model_advanced.ModelSamplingContinuousEDM"
    with pytest.raises(PatchError, match="timesteps from 1000"):
        run.call(node(name, patched, "eps", 120.0, 0.002), sd15, SIGMAS)


def compiled(model: Any, backend: str = "eager") -> Any:
    """What TorchCompileModel does, with another backend (the point is what graphs watch)."""
    module = importlib.import_module("comfy_extras.nodes_torch_compile")
    model = model.clone()
    module.set_torch_compile_wrapper(
        model=model, backend=backend, options={"guard_filter_fn": module.skip_torch_compile_dict}
    )
    return model


def breaking(attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Attention that the compiler cannot take into its graph, as that of some packs."""
    torch._dynamo.graph_break()
    return attention(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "broken graph"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "z-image"])
def test_compiled_graphs_are_told_apart(real, run, host, name, broken):
    """ComfyUI's compile node ignores `transformer_options`: no graph may serve another patch."""
    family = real.FAMILIES.get(name) or pytest.skip("this release of diffusers does not know it")
    torch._dynamo.reset()
    plain, sigmas = family.comfy(), torch.tensor([0.5, 0.5])
    if broken:
        plain.model_options["transformer_options"]["optimized_attention_override"] = breaking
    patch = family.patch(sites="all", std=0.1)
    whole, fading = run.record(patch), run.record(patch, curve=(1.0, 0.5, 0.0))
    records = [whole, run.record(family.patch(7, sites="all", std=0.1), strength=0.5), fading]
    variants = [plain, *(host.attach(plain, record) for record in records), plain]
    variants.insert(2, host.attach(variants[1], whole))
    masks = torch.eye(2)[:, None]  # the upper half of the first item, the lower of the second
    variants.insert(-1, host.attach(plain, run.record(patch, mask=masks.mT)))
    for noise in (sigmas, 1.5 * sigmas):  # the second finds the graphs of the first
        for variant in variants:
            eager = run.call(variant, family, noise)
            graph = run.call(compiled(variant), family, noise)
            torch.testing.assert_close(graph, eager, atol=1e-4, rtol=1e-4)


def test_hooks_and_compiling_exclude_each_other(real, run, host):
    family = real.FAMILIES["pixart"]
    patched = compiled(host.attach(family.comfy(), run.record(family.patch())))
    with pytest.raises(PatchError, match="needs hooks on a PixArtMS"):
        run.call(patched, family, torch.tensor([2.0]))


def test_latents_of_a_call_are_not_changed(sd15, run, host):
    patched = host.attach(sd15.comfy(), run.record(sd15.patch(sites="all")))
    seen: list[Tensor] = []

    def wrapper(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend((x, x.clone()))
        return executor(x, *args, **kwargs)

    patched.add_wrapper_with_key("apply_model", "spy", wrapper)
    run.call(patched, sd15, SIGMAS)
    assert torch.equal(*seen)


def test_z_image_in_pixel_space_is_refused(real, run, host):
    import comfy.model_patcher
    import comfy.supported_models

    kind = getattr(comfy.supported_models, "ZImagePixelSpace", None)
    if kind is None:
        pytest.skip("needs a version of ComfyUI with Z-Image in pixel space")
    family, device = real.FAMILIES["z-image"], torch.device("meta")
    sizes = {"decoder_hidden_size": 32, "decoder_num_res_blocks": 1, "patch_size": 2}
    model = kind({**family.unet, **sizes}).get_model({}, device=device)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
    with pytest.raises(PatchError, match="Z-Image in pixel space"):
        host.attach(patcher, run.record(family.patch()))
