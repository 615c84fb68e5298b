"""A tiny base of the digits family, and runs that take a second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dmp_common import Patch, families, register_base
from training.config import TrainConfig
from training.frozen import FrozenBase
from training.loop import History, train

TINY = register_base(
    families.dit(
        "tiny-digits", depth=2, width=16, patch_size=2, in_channels=1, frequency_shift=1.0,
        grid=(4, 4),
    )
)  # fmt: skip


class TinyData(torch.utils.data.Dataset):
    """Noise with labels: enough to see what a loop does."""

    def __init__(self, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(count, 1, 8, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixels": self.images[index], "label": torch.tensor(index % 10)}


@pytest.fixture
def frozen() -> FrozenBase:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=1, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return FrozenBase(
        model.eval().requires_grad_(False), DDIMScheduler(), TINY, "diffusers", null_label=10
    )


Run = Callable[..., tuple[Patch, History]]


@pytest.fixture
def run(frozen: FrozenBase) -> Run:
    def run(
        validate: Callable[[], float] = lambda: 0.0, **options: object
    ) -> tuple[Patch, History]:
        defaults = {"max_train_steps": 4, "train_batch_size": 16, "lr_scheduler": "constant"}
        config = TrainConfig(base="tiny-digits", **{**defaults, **options})
        torch.manual_seed(config.seed)
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=config.gradient_accumulation_steps
        )
        patch = Patch.create(TINY, **config.variant, **frozen.facts)
        history = train(config, accelerator, frozen, patch, TinyData(), validate)
        return patch, history

    return run
