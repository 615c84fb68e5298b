"""Random weights to train from scratch: what the bases that nobody published begin with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from dmp_common import get_base
from dmp_common.patch.serialize import serialize, write_atomically
from training.base.dit_folders import TEXT_FILE
from training.base.families.dit import initialise, share_embeddings, use_text
from training.experiments.paper.cells import Untrained
from training.methods.full import DIFFUSERS_SHIFT, replace_folder

_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def make_untrained(base: str, untrained: Untrained, folder: Path, seed: int = 0) -> None:
    """Writes a DiT of random weights for latents of 256 x 256 pixels, in the layout of diffusers.

    It learns sigma and begins as the original does.

    Args:
        base: dit-b/2 and its like.
        untrained: number of classes (0 for none) or size of pooled text, and noise schedule.
        folder: is made whole, or not at all.

    Source: facebookresearch/DiT, models.py.
    """
    spec = get_base(base)
    width, depth = spec.sites[0].width, len(spec.sites)
    heads = max(1, min(width // 64, 16))  # S 6, B 12, L and XL 16
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=32,
        patch_size=spec.sites[0].stride,
        num_embeds_ada_norm=untrained.classes,
    )
    share_embeddings(model)
    if untrained.text is not None:
        use_text(model, untrained.text)
    initialise(model)
    partial = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_config(partial / "transformer")
    # One embedding for all blocks, which diffusers' files hold once for each.
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    weights = partial / "transformer" / "diffusion_pytorch_model.safetensors"
    write_atomically(weights, serialize(tensors, {"format": "pt"}))
    if untrained.text is not None:
        facts = {"size": untrained.text, "frequency_shift": DIFFUSERS_SHIFT}
        (partial / TEXT_FILE).write_text(json.dumps(facts), encoding="utf-8")
    DDPMScheduler(
        beta_schedule=_SCHEDULES[untrained.schedule],
        variance_type="learned_range",
        clip_sample=False,
    ).save_pretrained(partial / "scheduler")
    replace_folder(partial, folder)
