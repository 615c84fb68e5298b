"""Patches on A1111's own Stable Diffusion 3 in small, beside diffusers' with the same weights.

WEBUI_PATH=...  A1111's folder
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn as nn
from diffusers.loaders import single_file_utils
from torch import Tensor

from dmp_common import Patch, attach, bases, register_base
from dmp_common.attach.record import LoadedPatch, PatchRecord
from tests.a1111_dmp import stand_in
from tests.randomness import randomise
from tests.tinymodel import noise

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

DEPTH, TEXT, POOLED, SIDE = 2, 16, 12, 24  # the host makes 64 channels for each block
SIGMAS = torch.tensor([0.8, 0.3])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Our files in a stand-in for A1111, with the real modules of its SD3."""
    folder = Path(os.environ.get("WEBUI_PATH", "")) / "modules"
    if not (folder / "models" / "sd3" / "sd3_impls.py").is_file():
        pytest.skip("needs A1111's source: set WEBUI_PATH to its folder")
    host = stand_in.install(monkeypatch, tmp_path / "models")
    host.modules.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "modules.sd_hijack", types.ModuleType("modules.sd_hijack"))
    for name in ("models", "models.sd3", "models.sd3.mmdit", "models.sd3.other_impls"):
        monkeypatch.delitem(sys.modules, f"modules.{name}", raising=False)
    try:
        host.sd3 = importlib.import_module("modules.models.sd3.sd3_impls")
    except ImportError as error:
        pytest.skip(f"needs the Python packages of A1111: {error}")
    finally:
        for name in [name for name in sys.modules if name.startswith("modules.models")]:
            monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    return host


@pytest.fixture
def base() -> Any:
    sizes = {"depth": DEPTH, "width": 64 * DEPTH, "dual": False, "hub_id": None}
    return register_base(bases.sd3("a1111-sd3", **sizes))


@pytest.fixture
def model(host: SimpleNamespace) -> Any:
    """The host's model, which it reads its own configuration off the weights for."""
    sizes = {
        "x_embedder.proj.weight": (64 * DEPTH, 16, 2, 2),
        "pos_embed": (1, SIDE**2, 64 * DEPTH),
        "y_embedder.mlp.0.weight": (64 * DEPTH, POOLED),
        "context_embedder.weight": (64 * DEPTH, TEXT),
    }
    model = host.sd3.BaseModel(3.0, state_dict={k: torch.empty(v) for k, v in sizes.items()})
    model.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.diffusion_model.state_dict().values():
        fan = tensor[0].numel() if tensor.dim() > 1 else 100
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * fan**-0.5)
    host.modules.shared.sd_model = SimpleNamespace(
        model=model,
        parameterization="eps",
        sd_checkpoint_info=SimpleNamespace(filename="models/own.safetensors"),
    )
    return model


def twin_of(model: Any) -> nn.Module:
    """diffusers' model with these weights, converted by its own loader."""
    twin = diffusers.SD3Transformer2DModel(
        sample_size=16,
        num_layers=DEPTH,
        attention_head_dim=64,
        num_attention_heads=DEPTH,
        joint_attention_dim=TEXT,
        caption_projection_dim=64 * DEPTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=SIDE,
    )
    weights = dict(model.diffusion_model.state_dict())
    twin.load_state_dict(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(weights))
    return twin.eval().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, captions and their summaries."""
    shapes = ((2, 16, 16, 12), (2, 5, TEXT), (2, POOLED))
    return tuple(noise(n, torch.float32, *shape) for n, shape in enumerate(shapes))


def call(model: Any, sigmas: Tensor = SIGMAS) -> Tensor:
    """The denoised latents, as the host's sampler asks for them."""
    x, text, pooled = inputs()
    with torch.inference_mode():
        return model(x, sigmas, c_crossattn=text, y=pooled)


def call_twin(twin: nn.Module) -> Tensor:
    x, text, pooled = inputs()
    with torch.inference_mode():
        out = twin(x, text, pooled, 1000 * SIGMAS, return_dict=False)[0]
    return x - out * SIGMAS.reshape(-1, 1, 1, 1)


def attached(host: SimpleNamespace, patch: Patch, **settings: Any) -> Any:
    """The attachment, made as for a generation."""
    record = PatchRecord(LoadedPatch(patch, Path("test.safetensors")), **settings)
    session = importlib.import_module("a1111_dmp.session")
    return session.attached(host.host.current_model(), record)


@pytest.mark.parametrize("mix", ["add", "modulate"])
def test_patches_act_as_in_diffusers(host, base, model, mix):
    patch = randomise(Patch.create(base, mix=mix), 1, 0.2 if mix == "add" else 0.02).eval()
    twin = twin_of(model)
    plain = call(model)
    torch.testing.assert_close(plain, call_twin(twin), atol=1e-4, rtol=1e-4)
    with attached(host, patch, strength=0.7), attach(twin, patch, strength=0.7):
        found = call(model)
        torch.testing.assert_close(found, call_twin(twin), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(call(model), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mix", ["add", "modulate"])
def test_a_zero_patch_and_strength_zero_are_the_plain_model(host, base, model, mix):
    plain = call(model)
    zero = Patch.create(base, mix=mix).eval()
    for patch, strength in ((zero, 1.0), (randomise(Patch.create(base, mix=mix), 1).eval(), 0.0)):
        with attached(host, patch, strength=strength):
            assert torch.equal(call(model), plain)


def test_a_schedule_acts_at_the_progress_of_the_hosts_own_schedule(host, base, model):
    patch = randomise(Patch.create(base), 1).eval()
    for percent, acts in ((0.2, False), (0.4, True), (0.7, False)):
        sigma = model.model_sampling.sigma(torch.tensor(1000 * (1 - percent)))
        plain = call(model, sigma.expand(2))
        with attached(host, patch, start=0.3, end=0.6):
            assert torch.equal(call(model, sigma.expand(2)), plain) != acts
