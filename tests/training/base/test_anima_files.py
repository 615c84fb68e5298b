"""Anima in single files, as ComfyUI has them, and what its pipeline's folder lacks."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from tokenizers import processors

from dmp_common import PatchError
from tests.dmp_common.realanima import original_names
from tests.training import tinyfiles
from tests.training.base.test_separate_files import config_of, require_equal
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from training.base.frozen import find_base, load_frozen
from training.base.single_files import vae_of_file
from training.base.student_weights import load_student
from training.options.command_line import resolve

pytestmark = pytest.mark.skipif("anima" not in TRAINED, reason="needs a diffusers that knows it")


def transformer(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The transformer under its original names, with the conditioner inside of it."""
    weights = tinyfiles.weights_of(folder / "transformer")
    named = {original: weights[key] for key, original in original_names(weights).items()}
    inside = tinyfiles.weights_of(folder / "text_conditioner")
    named |= {f"llm_adapter.{key}": value + 0.5 for key, value in inside.items()}
    return {prefix + key: value for key, value in named.items()}


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_parts_come_from_files(prefix: str, folders: Folders, tmp_path: Path) -> None:
    """The conditioner from the transformer's file: no other is read."""
    folder = folders("anima")
    path = tinyfiles.save(tmp_path / "anima.safetensors", transformer(folder, prefix))
    text = tinyfiles.text_tensors(folder, "text_encoder")
    files = {
        "text_encoder": tinyfiles.save(tmp_path / "qwen_3_06b.safetensors", text),
        "vae": tinyfiles.save(tmp_path / "vae.safetensors", tinyfiles.vae_tensors(folder)),
    }
    config = config_of("anima", path, base_config=folder, **files)
    frozen, whole = load_frozen(config), load_frozen(config_of("anima", folder))
    with torch.no_grad():
        for value in whole.encoders["text_conditioner"].parameters():
            value.add_(0.5)
    require_equal(frozen, whole)
    assert find_base(config.model_copy(update={"base": "auto"})) is frozen.base
    cheap = load_student(frozen, path)  # as a file of the cheap model, where it has no prefix
    assert tinyfiles.same(cheap, frozen.model)


def test_a_conditioner_of_another_size_is_refused(folders: Folders, tmp_path: Path) -> None:
    tensors = transformer(folders("anima"), "net.")
    tensors["net.llm_adapter.norm.weight"] = torch.ones(3)
    path = tinyfiles.save(tmp_path / "anima.safetensors", tensors)
    with pytest.raises(PatchError, match=r"AnimaTextConditioner, found 1 that .* \(norm.weight\)"):
        load_frozen(config_of("anima", path, base_config=folders("anima")))


def test_the_empty_caption_is_the_same_alone_and_beside_others(folders: Folders) -> None:
    """Qwen3's tokenizer makes no token of it, so that the conditioner looks at nothing."""
    frozen = load_frozen(config_of("anima", folders("anima")))
    parts, config = frozen.encoders, resolve({"base": "anima"})
    parts["tokenizer"].backend_tokenizer.post_processor = processors.Sequence([])
    assert parts["tokenizer"]("").input_ids == []
    with torch.no_grad():
        alone, both = (
            frozen.family.encode_text(parts, texts, config)["prompt"][0]
            for texts in ([""], ["", "a red cat"])
        )
    assert alone[0].any() and not alone[2:].any()
    torch.testing.assert_close(alone, both)


def test_a_missing_package_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""
    monkeypatch.delattr(transformer_cosmos, "transforms")
    with pytest.raises(PatchError, match="the package torchvision, .* pip install torchvision"):
        load_frozen(config_of("anima", folders("anima")))


def test_qwen_images_vae_in_its_original_naming(tmp_path: Path) -> None:
    """qwen_image_vae.safetensors: the names are those of Wan's."""
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4)
    vae.save_pretrained(tmp_path / "vae")
    weights = {original_vae_name(key): value for key, value in vae.state_dict().items()}
    assert weights.keys().isdisjoint(vae.state_dict())
    path = tinyfiles.save(tmp_path / "vae.safetensors", weights)
    read = vae_of_file(path, type(vae), str(tmp_path), torch.float32)
    assert tinyfiles.same(read, vae)


def original_vae_name(key: str) -> str:
    """The name of a tensor of Wan's VAE in its original code; diffusers' table proves it."""
    block = r"decoder\.up_blocks\.(\d)\."
    key = re.sub(block + r"resnets\.(\d)", _level, key)
    key = re.sub(block + r"upsamplers\.(\d)", lambda m: _level(m, 3), key)
    for part, other in _VAE_PARTS.items():
        key = re.sub(part, other, key)
    return key


def _level(match: re.Match[str], more: int = 0) -> str:
    return f"decoder.upsamples.{4 * int(match[1]) + int(match[2]) + more}"


_VAE_PARTS = {
    r"mid_block\.resnets\.0": "middle.0",
    r"mid_block\.resnets\.1": "middle.2",
    r"mid_block\.attentions\.0": "middle.1",
    r"down_blocks": "downsamples",
    r"norm1\.": "residual.0.",
    r"conv1\.": "residual.2.",
    r"norm2\.": "residual.3.",
    r"conv2\.": "residual.6.",
    r"conv_shortcut": "shortcut",
    r"norm_out": "head.0",
    r"conv_out": "head.2",
    r"conv_in": "conv1",
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
}
