"""What the study of cheap calls compares: cheap calls, and what is trained to repair them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The cheap calls by the name of their folder: --student_quantization.
CALLS: dict[str, str] = {
    "3 bits in groups": "rtn3-group32",
    "3 bits per row": "rtn3",
    "4 bits per row": "rtn4",
}
# All that is trained has this in common: 200 steps of 64 images, as long as it takes to see it.
_SHARED: dict[str, Any] = {
    "objective": "distill",
    "train_batch_size": 64,
    "lr_scheduler": "cosine",
    "ema_decay": 0.0,
    "caption_dropout_rate": 0.0,
    "importance_weight": 0.0,
    "load_weight": 0.0,
}
_OUTPUTS = ",".join(f"block.{n}.{layer}" for n in range(6) for layer in ("to_out", "ff.out"))
_MODULATE: dict[str, Any] = {"method": "dmp", "mix": "modulate"}


@dataclass(frozen=True)
class Remedy:
    """Something that is trained on a cheap call.

    Args:
        options: the trainer's, besides those that all share.
        rates: learning rates to choose from on validation, as many for each.
    """

    options: Mapping[str, Any]
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)

    def all_options(self, call: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """The trainer's options for a cheap call, a rate and a seed."""
        return {
            **_SHARED, **self.options, "student_quantization": call, "learning_rate": rate,
            "seed": seed, "max_train_steps": steps, "lr_warmup_steps": min(20, steps // 10),
        }  # fmt: skip


# Sizes are those of bases of six blocks of width 64: digits and cifar10-s.
REMEDIES: dict[str, Remedy] = {
    # Ours: four pairs of a scale and a shift for each channel of the linear layers, each pair for
    # a part of the timesteps (27,648 values and the gate's 260).
    "modulate": Remedy(_MODULATE),
    # The modulation layers too, two pairs (23,040 and 130).
    "modulated": Remedy({**_MODULATE, "dmp_sites": "modulated", "grids": 2}),
    # The same without a gate, one pair (6,912); and gated at its size, four pairs at the outputs of
    # attention and feed-forward (6,144 and 260).
    "ungated": Remedy({**_MODULATE, "gate": "none"}),
    "modulate-few": Remedy({**_MODULATE, "dmp_sites": _OUTPUTS}),
    # LoRA of both sizes: 6,144 and 27,648 values.
    "lora": Remedy({"method": "lora", "network_dim": 2}, (1e-2, 3e-2, 1e-1)),
    "lora-large": Remedy({"method": "lora", "network_dim": 9}, (3e-3, 1e-2, 3e-2)),
    # The paper's prompts at block inputs, with its gate and without (7,200 and 6,144).
    "prompts": Remedy({"method": "dmp"}),
    "prompts-ungated": Remedy({"method": "prompt"}),
}
