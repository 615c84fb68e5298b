"""Bases with a language model as text encoder, and Wan: their caches on disk, and runs that are
resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmp_common import Patch
from tests.training.conftest import Train
from tests.training.tinybases import OWN, make_pictures
from training.run.state import find_states

LANGUAGE = ["lumina2", "z-image", "qwen-image", "qwen-image-2.1", "anima", "chroma", "krea2"]
LANGUAGE += ["flux2", "wan"]
CACHED = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]


@pytest.mark.parametrize("name", [*LANGUAGE, *(n for n, own in OWN.items() if own.resumed)])
def test_a_run_with_caches_is_resumed_without_them(name: str, train: Train, tmp_path: Path) -> None:
    """Latents and text from the disk are those that are computed, in padding and masks too."""
    own = f"tiny-{name}-dmp"
    pictures = make_pictures(tmp_path / "pictures")
    options = ["--save_state", "--save_every_n_steps", "2", "--train_batch_size", "2"]
    options += ["--train_data_dir", str(pictures)]
    out = train(name, *options, *CACHED, data="")
    cached = list(pictures.rglob("*.safetensors"))
    assert len(cached) >= 2 * 6, "latents and text of six pictures"
    whole = Patch.load(out / f"{own}.safetensors")
    early = find_states(out, own)[2]
    again = Patch.load(
        train(name, *options, "--resume", str(early), data="") / f"{own}.safetensors"
    )
    assert again.metadata["ss_steps"] == whole.metadata["ss_steps"] == "3"
    for key, tensor in whole.tensors().items():
        assert tensor.any(), key
        # Encoded in other batches: Adam makes much of rounding where a gradient is nearly 0.
        assert (tensor - again.tensors()[key]).norm() < 1e-3 * tensor.norm(), key
