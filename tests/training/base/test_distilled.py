"""Weights that were distilled to a few steps, told from siblings of one structure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dmp_common import PatchError
from tests.training.base.test_memory import config_of
from tests.training.base.test_pipelines import SIDE, from_pipeline, options_of
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from training.base.encoders import FrozenEncoders
from training.base.families import table
from training.base.families.family import Family
from training.base.frozen import load_frozen
from training.base.option_checks import weights_warnings
from training.base.places import Source
from training.objective.sampling import condition, draw_latents, is_guided, noises

HUB = "cache/models--krea--{}/snapshots/0a1b"


@pytest.mark.parametrize(
    ("family", "place", "distilled"),
    [
        (table.FLUX2_KLEIN, "models/flux-2-klein-4b.safetensors", True),
        (table.FLUX2_KLEIN, "base/FLUX.2-klein-9B-fp8.safetensors", True),
        (table.FLUX2_KLEIN, "models/flux-2-klein-base-4b.safetensors", False),
        (table.FLUX2_KLEIN, "models/mine.safetensors", False),
        (table.FLUX2_KLEIN, "FLUX.2-klein-4B/transformer", True),
        (table.FLUX2_KLEIN, "FLUX.2-klein-base-4B/transformer", False),
        (table.FLUX2, "FLUX.2-klein-4B/transformer", False),
        (table.KREA2, "krea/Krea-2-Raw", False),
        (table.KREA2, HUB.format("Krea-2-Turbo"), True),
        (table.KREA2, HUB.format("Krea-2-Raw"), False),
        (table.KREA2, "turbo/krea2_raw.safetensors", False),
        (table.ERNIE_IMAGE, "baidu/ERNIE-Image-Turbo", True),
        (table.ERNIE_IMAGE, "baidu/ERNIE-Image", False),
        (table.Z_IMAGE, "Tongyi-MAI/Z-Image-Turbo", True),
        (table.Z_IMAGE, "z_image_turbo_bf16.safetensors", True),
        (table.Z_IMAGE, "Z-Image-De-Turbo", False),
        (table.Z_IMAGE, "Tongyi-MAI/Z-Image", False),
        (table.FLUX, "flux1-schnell.safetensors", True),
        (table.FLUX, "flux1-dev.safetensors", False),
        (table.FLUX, "flux1-dev-schnell-merge.safetensors", False),
        (table.FLUX, "flux-schnell-dedistilled.safetensors", False),
    ],
)
def test_names_tell_siblings_apart(family: Family, place: str, distilled: bool) -> None:
    kind = "single" if place.endswith("s") else "denoiser"
    found = family.of_weights(Source(place, kind))
    assert (found.distilled, found.guidance) == (distilled, 1.0 if distilled else family.guidance)


@pytest.mark.skipif("krea2" not in TRAINED, reason="needs a diffusers that knows it")
def test_distilled_krea2_draws_as_its_pipeline(folders: Folders, tmp_path: Path) -> None:
    """With the shift of its own, and without guidance, which is refused."""
    folder = tmp_path / "mine"
    shutil.copytree(folders("krea2"), folder)
    index = folder / "model_index.json"
    facts = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps({**facts, "is_distilled": True}), encoding="utf-8")
    config = config_of("krea2", folder, **options_of("krea2"))
    frozen, usual = (load_frozen(config_of("krea2", at)) for at in (folder, folders("krea2")))
    noise, _ = noises(["krea2"], (frozen.channels, SIDE, SIDE))
    told = condition(frozen, FrozenEncoders(frozen, config), "a red cat", (16, 16), 1.0)
    drawn = draw_latents(frozen, noise, told, None, steps=2, scale=1.0)
    made = from_pipeline(frozen, "krea2", noise, 1.0)
    assert float((drawn - made).abs().max()) < 1e-4 * float(made.abs().max())
    other = draw_latents(usual, noise, told, None, steps=2, scale=1.0)
    assert not usual.family.distilled and float((drawn - other).abs().max()) > 1e-3
    with pytest.raises(PatchError, match="guidance scale of 1 for the distilled weights"):
        is_guided(frozen, 4.0)
    (warning,) = weights_warnings(config, frozen.family)
    assert "such as Krea-2-Raw;" in warning
