"""The controls without which an improvement says little about gating.

A patch may beat its base because training went on at a good rate, because its weights were
averaged, or because it has more parameters. Prompt tuning, full fine-tuning with EMA and a LoRA of
equal size have these too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.evaluation.models import Compared
from training.evaluation.spec import TRAINED

CONTROLS = {
    "prompt": "prompt tuning (a patch without gate)",
    "lora": "LoRA of equal size",
    "full": "full fine-tuning with EMA",
}
_NEAR = 0.25  # share by which a LoRA may be larger or smaller than the patch


@dataclass(frozen=True)
class Controls:
    """What there is of controls.

    Args:
        missing: kinds that are not given, in the order of `CONTROLS`.
        mismatches: what is given and is not what it should be, a sentence each.
    """

    missing: list[str]
    mismatches: list[str]

    @property
    def text(self) -> str:
        """For the first line of a report; "" where all is there."""
        said = []
        if self.missing:
            names = ", ".join(CONTROLS[kind] for kind in self.missing)
            said.append(
                f"Controls are missing: {names}. What the gate does is then confounded with the "
                "learning rate, EMA or the number of parameters."
            )
        return " ".join([*said, *self.mismatches])


def check_controls(models: Mapping[str, Sequence[Compared]], repairs: bool = False) -> Controls:
    """Which controls are missing, and which are not what they should be.

    Args:
        models: the models by label, one for each seed.
        repairs: they repair a cheap model, whose weights are not to be stored once more; full
            fine-tuning is then no control.
    """
    given = {model.spec.kind for files in models.values() for model in files}
    everyone = [(label, model) for label, files in models.items() for model in files]
    sizes = [model.parameters for _, model in everyone if model.spec.kind == "dmp"]
    mismatches = []
    for label, model in everyone:
        if model.spec.kind == "full" and not model.trained["ema_decay"]:
            mismatches.append(f"{label} is full fine-tuning without EMA, or does not say so.")
        if model.spec.kind == "lora" and sizes:
            patch = sum(sizes) / len(sizes)
            share = model.parameters / patch
            if not 1 - _NEAR <= share <= 1 + _NEAR:
                mismatches.append(
                    f"{label} has {model.parameters:,} parameters, {share:.2f} times those of the "
                    f"patch ({patch:,.0f}): a LoRA of equal size needs another --network_dim."
                )
    wanted = [kind for kind in CONTROLS if not (repairs and kind == "full")]
    missing = [kind for kind in wanted if kind not in given]
    if not given & set(TRAINED):
        missing = []  # nothing that was trained is compared
    return Controls(missing, list(dict.fromkeys(mismatches)))
