"""What is trained to repair a cheap call, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dmp_common import get_base
from training.experiments.cheap.calls import EXACT, CheapCall
from training.options import presets

# All that is trained has this in common. Timesteps are weighted by 1 / the gap: plainly weighted,
# the least noisy ones, where the gap is largest, hide the others, on which pictures depend.
_DISTILLED: dict[str, Any] = {"objective": "distill", "teacher_weighting": "gap"}
_SHARED: dict[str, Any] = {
    "train_batch_size": 64,
    "lr_scheduler": "cosine",
    "ema_decay": 0.0,
    "caption_dropout_rate": 0.0,
    "importance_weight": 0.0,
    "load_weight": 0.0,
}
_MODULATED = {"method": "dmp", "mix": "modulate", "dmp_sites": "modulated"}
_OUTPUTS = ",".join(f"block.{n}.{layer}" for n in range(6) for layer in ("to_out", "ff.out"))


def _held_out(share: float) -> dict[str, Any]:
    return {"validation_split": share, "max_validation_images": 16}


@dataclass(frozen=True)
class Remedy:
    """Something that is trained on a cheap call.

    Args:
        options: the trainer's, besides those that all share.
        start: the learning rate at which tuning begins; it also tries about a third and three times
            of it.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    start: float = 1e-2

    def all_options(
        self, call: str, made: Mapping[str, Any], rate: float, seed: int, steps: int
    ) -> dict[str, Any]:
        """The trainer's options for a cheap call, a rate and a seed.

        Args:
            made: the trainer's options that make the cheap call.
        """
        aim = {} if call == EXACT else _DISTILLED
        found = {**_SHARED, "lr_warmup_steps": min(20, steps // 10), **aim, **self.options}
        skipped = CheapCall(call).skipped
        if skipped is not None and found.get("dmp_sites") in get_base("digits").output_sets:
            found["dmp_sites"] = _without(str(found["dmp_sites"]), f"block.{skipped}.")
        return {
            **found, **made,
            "learning_rate": rate, "seed": seed, "max_train_steps": steps,
        }  # fmt: skip


def _without(named: str, prefix: str) -> str:
    """The sites of a named set but for those of a block that is left out, which a shift of its
    modulation layer would bring back."""
    base = get_base("digits")  # cifar10-s has the same sites
    return ",".join(site for site in base.output_sets[named] if not site.startswith(prefix))


# Sizes are those of bases of six blocks of width 64: digits and cifar10-s.
REMEDIES: dict[str, Remedy] = {
    # --recipe repair: four pairs of a scale and a shift for each channel of the linear layers and
    # the modulation layers, each pair for a part of the timesteps (46,080 values, gate 260).
    "repair": Remedy(_MODULATED),
    # One pair at the same layers: learned scales and shifts that do not see the timestep (11,520).
    "ungated": Remedy({"method": "prompt", "mix": "modulate", "dmp_sites": "modulated"}),
    # Two pairs and eight.
    "repair-2": Remedy({**_MODULATED, "grids": 2}),
    "repair-8": Remedy({**_MODULATED, "grids": 8}),
    # From a tenth and a hundredth of the training images; the others are held out.
    "repair-tenth": Remedy({**_MODULATED, **_held_out(0.9)}),
    "repair-hundredth": Remedy({**_MODULATED, **_held_out(0.99)}),
    # The same on what the full model passes through while it draws, in the place of noised data.
    "repair-states": Remedy(
        {**_MODULATED, "states": "teacher", "trajectories": 2000, "state_sampler": "unipc"}
    ),
    # A LoRA of the size of "repair" (46,080).
    "lora": Remedy({"method": "lora", "network_dim": 15}, 3e-2),
    # The same whose rank falls with the noise (T-LoRA).
    "t-lora": Remedy({"method": "lora", "network_dim": 15, "network_min_dim": 7}, 3e-2),
    # All weights of the cheap model, and with that no cheap model any more.
    "full": Remedy({"method": "full"}, 3e-4),
    # The modulation layers alone, where a change is one of vectors and costs next to nothing
    # (18,432 values, gate 260); without a gate (4,608); and a LoRA of the first's size.
    "modulation": Remedy({"method": "dmp", "mix": "modulate", "dmp_sites": "modulation"}),
    "modulation-ungated": Remedy(
        {"method": "prompt", "mix": "modulate", "dmp_sites": "modulation"}
    ),
    "lora-modulation": Remedy({"method": "lora", "network_dim": 6}, 3e-2),
    # With a gate and without, at one size: four pairs at the outputs of attention and feed-forward
    # (6,144, gate 260), or one at every linear layer (6,912).
    "gated-small": Remedy({"method": "dmp", "mix": "modulate", "dmp_sites": _OUTPUTS}),
    "ungated-small": Remedy({"method": "prompt", "mix": "modulate"}),
    "lora-small": Remedy({"method": "lora", "network_dim": 2}, 3e-2),
    # Prompts at block inputs: the paper's gate as it is with its balancing losses and constant
    # rate, the same tuned, stages, residual, and no gate (6,144 values, gates 260 to 1,056).
    "paper": Remedy({"method": "dmp", **presets.RECIPES["paper"], "train_batch_size": 64}, 1e-2),
    "prompts": Remedy({"method": "dmp"}),
    "prompts-stages": Remedy({"method": "dmp", **presets.STAGES}),
    "prompts-residual": Remedy({"method": "dmp", "gate_form": "residual", "gate_init": "random"}),
    "prompts-ungated": Remedy({"method": "prompt"}),
    # What the full model gains from a patch of the same size on its own data: is a repair a repair?
    "data": Remedy(
        {"method": "dmp", "mix": "modulate", "dmp_sites": "modulated", "ema_decay": 0.99}, 3e-4
    ),
    "clean": Remedy({"method": "dmp", **presets.RECIPES["clean"], "ema_decay": 0.99}, 3e-4),
}
