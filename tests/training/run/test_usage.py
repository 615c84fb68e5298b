"""The lines that a run prints to use its result are executed, from another working directory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmp_common import PatchError
from tests.tiny import FAMILIES
from tests.training import tinyfiles
from tests.training.base.test_loading import dit_of_one_embedding, original_dit
from tests.training.conftest import Folders
from tests.training.tinybases import make_vae
from training.base.cheap import cheap_base
from training.base.frozen import FrozenBase, load_frozen
from training.methods.known import METHODS
from training.options.command_line import resolve
from training.run import usage
from training.run.usage import use_lines

Options = dict[str, Any]


def separate(name: str, folder: Path, root: Path) -> Options:
    """One file for each part, as kohya's users have them."""
    denoiser = tinyfiles.denoiser_tensors(folder, name)
    options: Options = {
        "pretrained_model_name_or_path": tinyfiles.save(root / "model.safetensors", denoiser),
        "ae": tinyfiles.save(root / "ae.safetensors", tinyfiles.vae_tensors(folder)),
        "base_config": folder,
    }
    parts = {"flux": {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"}}.get(name, {})
    for option, part in parts.items():
        tensors = tinyfiles.text_tensors(folder, part)
        options[option] = tinyfiles.save(root / f"{option}.safetensors", tensors)
    return options


def whole(name: str, folder: Path, root: Path) -> Options:
    """All parts in one file."""
    parts = tinyfiles.IN_FILE[name]
    path = tinyfiles.save_single(root / "whole.safetensors", folder, name, "vae", *parts)
    return {"pretrained_model_name_or_path": path, "base_config": folder}


def pickled(name: str, folder: Path, root: Path) -> Options:
    """The same as a .ckpt."""
    options = whole(name, folder, root)
    tensors = tinyfiles.weights_of(root)
    torch.save({"state_dict": tensors}, root / "whole.ckpt")
    return {**options, "pretrained_model_name_or_path": root / "whole.ckpt"}


def original(name: str, folder: Path, root: Path) -> Options:
    """A .pt of the original DiT, whose time embedding has another constant."""
    torch.save(original_dit(dit_of_one_embedding()), root / "dit.pt")
    return {
        "pretrained_model_name_or_path": root / "dit.pt",
        "base_config": folder,
        "vae": folder / "vae",
    }


def pipeline(name: str, folder: Path, root: Path) -> Options:
    """A folder of diffusers."""
    return {"pretrained_model_name_or_path": folder}


def rounded(name: str, folder: Path, root: Path) -> Options:
    """A folder of diffusers, of which a cheap model is made."""
    cheap = {"student_quantization": "rtn3", "objective": "distill"}
    return {"pretrained_model_name_or_path": folder, **cheap}


def alone(name: str, folder: Path, root: Path) -> Options:
    """The folder of a denoiser alone."""
    part = "unet" if name == "sd15" else "transformer"
    options: Options = {"pretrained_model_name_or_path": folder / part, "vae": folder / "vae"}
    return options | ({"base_config": folder} if name != "dit" else {})


def another_vae(name: str, folder: Path, root: Path) -> Options:
    """A folder of diffusers, with another VAE, and half precision."""
    make_vae().save_pretrained(root / "vae")
    options = {"vae": root / "vae", "mixed_precision": "bf16"}
    return {"pretrained_model_name_or_path": folder, **options}


def denoiser_of(result: dict[str, Any], frozen: FrozenBase) -> torch.nn.Module:
    if not frozen.family.pipeline:
        return result["model"]
    pipe = result["pipe"]
    assert type(pipe).__name__ == frozen.family.pipeline
    assert pipe.vae is not None
    assert pipe.text_encoder is not None
    assert pipe.tokenizer is not None
    return getattr(pipe, frozen.family.denoiser)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of diffusers
@pytest.mark.parametrize(
    ("name", "weights", "method"),
    [
        *((name, pipeline, "dmp") for name in ("sd15", "sdxl", "sd3", "flux", "pixart", "dit")),
        *((name, pipeline, "lora") for name in ("sdxl", "flux", "pixart", "dit")),
        *((name, pipeline, "full") for name in ("sd15", "flux", "pixart", "dit")),
        *((name, pipeline, "dmp") for name in ("flux2", "wan", "krea2", "anima")),
        ("anima", pipeline, "lora"),
        ("dit", pipeline, "joint"),
        *((name, rounded, method) for name in ("sd15", "dit") for method in ("dmp", "lora")),
        ("sd15", alone, "dmp"),
        ("dit", alone, "prompt"),
        ("sd15", another_vae, "dmp"),
        ("sd15", whole, "dmp"),
        ("sd15", whole, "lora"),
        ("sd15", pickled, "dmp"),
        ("flux", separate, "dmp"),
        ("sdxl", separate, "full"),
        *(("dit", original, method) for method in ("dmp", "lora", "full", "joint")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_lines_load_what_was_trained(
    name: str,
    weights: Callable[[str, Path, Path], Options],
    method: str,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tinyfiles.narrow(monkeypatch)
    root, elsewhere = tmp_path / "files", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    options = {key: str(value) for key, value in weights(name, folders(name), root).items()}
    config = resolve({"base": FAMILIES[name].base.name, "method": method, **options})
    monkeypatch.chdir(tmp_path)
    frozen = load_frozen(config)
    frozen = cheap_base(frozen, config) if config.has_student else frozen
    trained = METHODS[method](frozen, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for value in trained.trainable().values():
            value.add_(0.1 * torch.randn_like(value))
    path = Path("out") / f"result{trained.ending}"
    path.parent.mkdir()
    trained.save(path, {}, torch.float32)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    expected = FAMILIES[name].run(frozen.model, dtype=dtype)
    trained.remove()
    lines = use_lines(config, frozen, path)

    monkeypatch.chdir(elsewhere)
    result: dict[str, Any] = {}
    exec("\n".join(lines), result)
    model = denoiser_of(result, frozen)
    found = FAMILIES[name].run(model, dtype=dtype)
    # Convolutions round by how their weights lie in memory.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), lines


def test_text_conditional_dit(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose text embedding diffusers does not know."""
    text = {"text_conditional": True, "text_encoder": str(folders("sd15"))}
    place = {"base": "tiny-dit", "pretrained_model_name_or_path": str(folders("dit"))}
    config = resolve({**place, **text, "method": "full"})
    frozen = load_frozen(config)
    METHODS["full"](frozen, config).save(tmp_path / "full", {}, torch.float32)
    vae = str(folders("dit") / "vae")
    monkeypatch.setattr(usage, "_is_installed", lambda: False)
    for method, given in (("full", config), ("dmp", None)):
        if given is None:
            weights = {"pretrained_model_name_or_path": str(tmp_path / "full"), "vae": vae}
            given = resolve({**place, **text, **weights, "method": "dmp"})
            frozen = load_frozen(given)
            METHODS["dmp"](frozen, given).save(tmp_path / "p.safetensors", {}, torch.float32)
        result: dict[str, Any] = {}
        path = tmp_path / ("full" if method == "full" else "p.safetensors")
        lines = use_lines(given.model_copy(update={"vae": vae}), frozen, path)
        assert lines[0].startswith("import sys; sys.path.insert(0, ")
        exec("\n".join(lines), result)
        assert tinyfiles.same(result["model"], frozen.model)


def test_the_bundled_digits_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve({"base": "digits"})
    frozen = load_frozen(config)
    METHODS["dmp"](frozen, config).save(tmp_path / "p.safetensors", {}, torch.float32)
    monkeypatch.setattr(usage, "_is_installed", lambda: True)
    lines = use_lines(config, frozen, tmp_path / "p.safetensors")
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    result: dict[str, Any] = {}
    exec("\n".join(lines), result)
    assert tinyfiles.same(result["model"], frozen.model)


def test_a_base_of_the_hub_keeps_its_name(folders: Folders, tmp_path: Path) -> None:
    """And its variant and precision; nothing is loaded from there in this test."""
    config = resolve({"base": "tiny-sd15", "pretrained_model_name_or_path": str(folders("sd15"))})
    frozen = load_frozen(config)
    asked = config.model_copy(
        update={
            "pretrained_model_name_or_path": "somebody/model",
            "weights_variant": "fp16",
            "mixed_precision": "fp16",
        }
    )
    lines = use_lines(asked, frozen, tmp_path / "p.safetensors")
    assert (
        'pipe = diffusers.StableDiffusionPipeline.from_pretrained("somebody/model", '
        'torch_dtype=torch.float16, variant="fp16")'
    ) in lines
    assert "import diffusers, dmp_common as dmp, torch" in lines


def test_a_pipeline_that_diffusers_does_not_have(folders: Folders) -> None:
    config = resolve({"base": "tiny-dit", "pretrained_model_name_or_path": str(folders("dit"))})
    with pytest.raises(PatchError, match="found tiny-dit: use its `model`"):
        load_frozen(config).pipeline()
