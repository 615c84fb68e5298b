"""The Stable Diffusion UNets: 1.x, 2.x, XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError
from training.base.families.family import Family, Given, like

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class UNet(Family):
    """Stable Diffusion 1.x and 2.x: one CLIP, its last hidden state."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D)."""
        prompt = like(given["prompt"], noisy)
        output: Tensor = model(noisy, t, encoder_hidden_states=prompt).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D)}, from the layer that --clip_skip names, with the final norm."""
        encoder = parts["text_encoder"]
        windows = token_windows(parts["tokenizer"], captions, config.max_token_length)
        # kohya counts from 1, the last layer; diffusers from 0.
        output = run_windows(encoder, windows, -(config.clip_skip or 1))
        hidden = final_norm(encoder)(output.hidden)
        return {"prompt": join_windows(hidden, windows)}


class UNetXL(Family):
    """Stable Diffusion XL: two CLIPs, their last layer but one, and the second's pooled text."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D), "pooled" (B, P) and "sizes" (B, 6)."""
        added = {
            "text_embeds": like(given["pooled"], noisy),
            "time_ids": like(given["sizes"], noisy),
        }
        prompt = like(given["prompt"], noisy)
        output: Tensor = model(
            noisy, t, encoder_hidden_states=prompt, added_cond_kwargs=added
        ).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "pooled": (B, P)}."""
        if config.clip_skip is not None:
            raise PatchError(
                "expected no --clip_skip for SDXL, which always takes the last layer but one, "
                f"found {config.clip_skip}: leave it out."
            )
        prompts = []
        for end in ("", "_2"):
            windows = token_windows(parts[f"tokenizer{end}"], captions, config.max_token_length)
            output = run_windows(parts[f"text_encoder{end}"], windows, -2)
            prompts.append(join_windows(output.hidden, windows))
        windows_of = output.pooled.reshape(len(captions), -1, output.pooled.shape[-1])
        pooled = windows_of[:, 0]  # of the first window
        return {"prompt": torch.cat(prompts, dim=-1), "pooled": pooled}


class WindowOutput:
    """What CLIP said of windows: hidden (B * W, 77, D), pooled (B * W, P) where it has a
    projection."""

    def __init__(self, hidden: Tensor, pooled: Tensor) -> None:
        self.hidden, self.pooled = hidden, pooled


def token_windows(tokenizer: Any, captions: list[str], length: int) -> Tensor:
    """Token ids (B, W, 77) of captions, in W windows with a begin and an end each.

    Longer captions than CLIP's 75 tokens are cut into windows, as kohya and the web UIs do.

    Args:
        length: tokens without begin and end: 75, 150 or 225.
    """
    inside = tokenizer.model_max_length - 2
    count = max(1, length // inside)
    texts = tokenizer(
        captions, add_special_tokens=False, truncation=True, max_length=count * inside
    ).input_ids
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [
        [begin, *text[start : start + inside], end]
        for text in texts
        for start in range(0, count * inside, inside)
    ]
    padded = [row + [pad] * (inside + 2 - len(row)) for row in rows]
    return torch.tensor(padded).reshape(len(captions), count, inside + 2)


def run_windows(encoder: Any, windows: Tensor, layer: int) -> WindowOutput:
    """Hidden states of a layer (from the end, -1 the last) of all windows, and pooled text."""
    flat = windows.flatten(0, 1).to(encoder.device)
    with torch.no_grad():
        output = encoder(flat, output_hidden_states=True)
    pooled = getattr(output, "text_embeds", None)
    return WindowOutput(
        output.hidden_states[layer], output.pooler_output if pooled is None else pooled
    )


def join_windows(hidden: Tensor, windows: Tensor) -> Tensor:
    """Hidden states (B * W, 77, D) as one sequence (B, 75 W + 2, D): begin, the texts, end."""
    batch, count, length = windows.shape
    hidden = hidden.reshape(batch, count, length, -1)
    if count == 1:
        return hidden[:, 0]
    return torch.cat(
        [hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1
    )


def final_norm(encoder: Any) -> nn.Module:
    """CLIP's last layer norm, wherever this release of transformers keeps it."""
    inner = getattr(encoder, "text_model", encoder)
    norm: nn.Module = inner.final_layer_norm
    return norm
