"""Models that the trainer refuses by name: another family's, and those of other inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_model
from safetensors.torch import save_file

from dmp_common import PatchError
from tests.tiny import FAMILIES
from tests.training import tinyfiles
from tests.training.conftest import Folders
from training.base.frozen import find_base, load_frozen
from training.options.command_line import resolve


def test_a_file_of_a_family_without_support_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"ref_image_patch_embedder.weight": torch.zeros(2)}, path)
    config = resolve({"base": "auto", "pretrained_model_name_or_path": str(path)})
    with pytest.raises(PatchError, match="found those of OmniGen2, which is not supported, at"):
        find_base(config)


def test_a_file_that_diffusers_cannot_read_is_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its configuration is looked for, which may be on the hub."""
    path = tinyfiles.save_single(tmp_path / "a.safetensors", folders("sd3"), "sd3")
    monkeypatch.delitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "SD3Transformer2DModel")
    options = {"base": "tiny-sd3", "pretrained_model_name_or_path": str(path)}
    with pytest.raises(PatchError, match="reads no single files of a SD3Transformer2DModel"):
        load_frozen(resolve(options))


def test_a_model_for_inpainting_is_refused(folders: Folders, tmp_path: Path) -> None:
    """A patch runs on it, because it has the same sites; to train it would need masks."""
    shutil.copytree(folders("sd15"), tmp_path / "base")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base" / "unet")
    unet.conv_in = torch.nn.Conv2d(9, unet.conv_in.out_channels, 3, padding=1)
    unet.register_to_config(in_channels=9)
    unet.save_pretrained(tmp_path / "base" / "unet")
    options = {
        "base": FAMILIES["sd15"].base.name,
        "pretrained_model_name_or_path": str(tmp_path / "base"),
    }
    with pytest.raises(PatchError, match="in 4 channels, found one with 9 input channels"):
        load_frozen(resolve(options))


@pytest.mark.skipif("anima" not in FAMILIES, reason="needs a diffusers that knows it")
@pytest.mark.parametrize("base", ["auto", "tiny-anima"])
def test_a_pipeline_of_cosmos_is_not_taken_for_anima(
    base: str, folders: Folders, tmp_path: Path
) -> None:
    """Whose transformer is equal."""
    shutil.copytree(folders("anima"), tmp_path / "base")
    index = {"_class_name": "Cosmos2TextToImagePipeline"}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    options = {"base": base, "pretrained_model_name_or_path": str(tmp_path / "base")}
    with pytest.raises(PatchError, match="found Cosmos .Cosmos2TextToImagePipeline., which is not"):
        load_frozen(resolve(options))
