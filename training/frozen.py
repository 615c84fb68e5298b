"""The frozen base a patch is trained on: its model, its noise schedule, its facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn

from dmp_common import Base, PatchError, get_base
from dmp_common.detect import require_base
from dmp_common.sites import Naming
from dmp_common.timesteps import frequency_shift
from training.config import TrainConfig

DIGITS_BASE = Path(__file__).resolve().parent / "digits" / "base"


@dataclass(frozen=True)
class FrozenBase:
    """A base with its weights, in evaluation mode and without gradients of its own.

    Args:
        model: the denoiser.
        scheduler: diffusers scheduler; names the prediction type and adds noise.
        base, naming: what the model is.
        null_label: class id that means "no class".
    """

    model: nn.Module
    scheduler: Any
    base: Base
    naming: Naming
    null_label: int

    @property
    def facts(self) -> dict[str, Any]:
        """What a patch must record of the model it was trained on."""
        return {
            "prediction": self.scheduler.config.prediction_type,
            "frequency_shift": frequency_shift(self.model, self.base, self.naming),
        }


def load_frozen(config: TrainConfig) -> FrozenBase:
    """Loads the base a configuration asks for.

    Raises:
        PatchError: a base that cannot be trained yet, or no weights where they should be.
    """
    base = get_base(config.base)
    if base.name != "digits":
        raise PatchError(
            f"expected base digits, found {base.name}: patches of other bases can be made, loaded "
            "and attached with dmp_common, their trainer is still to come (README.md)."
        )
    folder = Path(config.pretrained_model_name_or_path or DIGITS_BASE)
    model, scheduler = _load_dit(folder)
    return FrozenBase(
        model=model.eval().requires_grad_(False),
        scheduler=scheduler,
        base=base,
        naming=require_base(model, base),
        null_label=int(model.config.num_embeds_ada_norm),
    )


def _load_dit(folder: Path) -> tuple[Any, Any]:
    from diffusers import DDIMScheduler, DiTTransformer2DModel  # slow to import

    missing = [name for name in ("transformer", "scheduler") if not (folder / name).is_dir()]
    if missing:
        raise PatchError(
            f"expected a diffusers folder with transformer/ and scheduler/ at {folder}, found no "
            f"{' and no '.join(missing)} there: check --pretrained_model_name_or_path."
        )
    try:
        model = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        return model, DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())
        raise PatchError(
            f"expected weights of a DiT at {folder}, found a folder that does not load ({found}): "
            "check --pretrained_model_name_or_path."
        ) from error
