"""What the study of cheap calls compares: cheap calls, and what is trained to repair them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The cheap calls: --student_quantization, or guidance of a scale without its second call.
CALLS = ("rtn3-group32", "rtn3", "rtn4", "guidance-2")
_GUIDANCE = "guidance-"
# All that is trained has this in common. Timesteps are weighted by 1 / the gap: plainly weighted,
# the least noisy ones, where the gap is largest, hide the others, on which pictures depend.
_SHARED: dict[str, Any] = {
    "objective": "distill",
    "teacher_weighting": "gap",
    "train_batch_size": 64,
    "lr_scheduler": "cosine",
    "ema_decay": 0.0,
    "caption_dropout_rate": 0.0,
    "importance_weight": 0.0,
    "load_weight": 0.0,
}
_OUTPUTS = ",".join(f"block.{n}.{layer}" for n in range(6) for layer in ("to_out", "ff.out"))


@dataclass(frozen=True)
class Remedy:
    """Something that is trained on a cheap call.

    Args:
        options: the trainer's, besides those that all share.
        rates: learning rates to choose from on validation, as many for each.
    """

    options: Mapping[str, Any]
    rates: tuple[float, ...]

    def all_options(self, call: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """The trainer's options for a cheap call, a rate and a seed."""
        return {
            **_SHARED, **self.options, **call_options(call), "learning_rate": rate,
            "seed": seed, "max_train_steps": steps, "lr_warmup_steps": min(20, steps // 10),
        }  # fmt: skip


def guidance_of(call: str) -> float:
    """The scale of the guidance that a cheap call lacks; 1 for those with weights of their own."""
    return float(call.removeprefix(_GUIDANCE)) if call.startswith(_GUIDANCE) else 1.0


def call_options(call: str) -> dict[str, Any]:
    """The trainer's options that make a cheap call and its exact one."""
    if call.startswith(_GUIDANCE):
        return {"teacher_guidance_scale": call.removeprefix(_GUIDANCE)}
    return {"student_quantization": call}


# Sizes are those of bases of six blocks of width 64: digits and cifar10-s.
REMEDIES: dict[str, Remedy] = {
    # --recipe repair: four pairs of a scale and a shift for each channel of the linear layers and
    # the modulation layers, each pair for a part of the timesteps (46,080 values, gate 260).
    "repair": Remedy({"method": "dmp", "mix": "modulate", "dmp_sites": "modulated"}, (5e-3, 1e-2)),
    # A LoRA of that size (46,080).
    "lora": Remedy({"method": "lora", "network_dim": 15}, (1e-2, 3e-2)),
    # The same at the modulation layers alone, where a change is one of vectors and costs next to
    # nothing (18,432 values, gate 260); without a gate (4,608); and a LoRA of the first's size.
    "modulation": Remedy(
        {"method": "dmp", "mix": "modulate", "dmp_sites": "modulation"}, (1e-2, 3e-2)
    ),
    "modulation-ungated": Remedy(
        {"method": "prompt", "mix": "modulate", "dmp_sites": "modulation"}, (1e-2, 3e-2)
    ),
    "lora-modulation": Remedy({"method": "lora", "network_dim": 6}, (1e-2, 3e-2)),
    # With a gate and without, at one size: four pairs at the outputs of attention and feed-forward
    # (6,144, gate 260), or one at every linear layer (6,912).
    "gated-small": Remedy(
        {"method": "dmp", "mix": "modulate", "dmp_sites": _OUTPUTS}, (1e-2, 3e-2)
    ),
    "ungated-small": Remedy({"method": "prompt", "mix": "modulate"}, (1e-2, 3e-2)),
    "lora-small": Remedy({"method": "lora", "network_dim": 2}, (1e-2, 3e-2)),
    # The paper's prompts at block inputs, with its gate and without (7,200 and 6,144).
    "prompts": Remedy({"method": "dmp"}, (1e-2, 3e-2)),
    "prompts-ungated": Remedy({"method": "prompt"}, (3e-3, 1e-2)),
}
