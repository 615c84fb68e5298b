"""What patches are worth on a base of natural pictures: repair, guidance, own samples, data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.picturebase import RECIPE, TINY, image_folders, pretrain, registered
from benchmarks.gpu.report import Part
from benchmarks.gpu.subjects import Setup
from dmp_common.patch.objectives import squared_distance
from training.base.cheap import cheap_base
from training.base.frozen import FrozenBase, load_frozen
from training.evaluation.models import Spec, load_compared
from training.experiments.miniature.cifar import SplitName, load_exported
from training.experiments.miniature.pretraining import as_float, build_scheduler
from training.experiments.miniature.subjects import SAMPLERS, Subject
from training.experiments.miniature.trial import train_trial
from training.objective.intervals import paired_interval
from training.objective.labelled import labelled_losses, labelled_samples
from training.options.config import TrainConfig

GUIDED = 2.0  # scale of the guidance that a patch stands for
_MODULATE = {"method": "dmp", "mix": "modulate"}
# name: options of the trainer, learning rate. The LoRA has about as many values as the first.
REMEDIES: dict[str, tuple[dict[str, Any], float]] = {
    "modulating patch": (_MODULATE, 1e-2),
    "the same without a gate": ({"method": "prompt", "mix": "modulate"}, 1e-2),
    "LoRA": ({"method": "lora", "mix": "modulate"}, 3e-3),
}
_SHARED: dict[str, Any] = {
    "recipe": "none",
    "lr_scheduler": "cosine",
    "ema_decay": 0.0,
    "importance_weight": 0.0,
    "load_weight": 0.0,
    "caption_dropout_rate": 0.0,
    "flip_aug": True,
    "max_data_loader_n_workers": 0,
}
CALLS = ("rtn3-group32", "rtn3", "rtn4")


@dataclass
class Worth:
    """The base of part 2, made by the first stage, and what is trained on it.

    Args:
        setup: the device.
        out: folder of everything that is made.
        base: folder of a base that is carried along; None trains one.
    """

    setup: Setup
    out: Path
    base: Path | None = None
    full: dict[float, Tensor] = field(default_factory=dict)

    @property
    def _recipe(self) -> Any:
        return TINY if self.setup.tiny else RECIPE

    @property
    def pictures(self) -> int:
        """Pictures of one comparison."""
        return 8 if self.setup.tiny else 500

    @property
    def steps(self) -> int:
        """Of each training."""
        return 4 if self.setup.tiny else self.setup.steps

    def make(self, seconds: float, part: Part) -> None:
        """Trains the base, unless one is carried along."""
        folder = self.out / "base"
        if self.base is None and not (folder / "transformer").is_dir():
            images = load_exported(image_folders(self.setup, self.out), "train")
            device = torch.device(self.setup.device)

            def said(text: str) -> None:
                part.add("training", text)

            model = pretrain(self._recipe, images, device, seconds, said)
            model.save_pretrained(folder / "transformer")
            build_scheduler().save_pretrained(folder / "scheduler")
        subject = self.subject
        held_out = subject.split("validation")
        losses = labelled_losses(
            self.exact, as_float(held_out.images)[: self.pictures],
            held_out.labels[: self.pictures], draws=1,
        )  # fmt: skip
        part.add("held-out loss of the base", float(losses.mean()))

    @cached_property
    def subject(self) -> Subject:
        """The base and its data."""
        images = image_folders(self.setup, self.out)
        return Subject(
            base=registered(self._recipe),
            weights=self.base or self.out / "base",
            options={"train_data_dir": str(images / "train"), "train_batch_size": self._batch},
            split=lambda which: load_exported(images, which),
            features=_no_features,
            classes=_no_features,
            samples=self.pictures,
            samplers=SAMPLERS,
            draws=1,
        )

    @property
    def _batch(self) -> int:
        return 4 if self.setup.tiny else 64

    @cached_property
    def exact(self) -> FrozenBase:
        """The base on the device."""
        weights = str(self.subject.weights)
        config = TrainConfig(base=self.subject.base, pretrained_model_name_or_path=weights)
        return load_frozen(config).to(torch.device(self.setup.device))

    def drawn(self, frozen: FrozenBase, scale: float = 1.0, split: SplitName = "test") -> Tensor:
        """Pictures from the noise that all models get."""
        labels = self.subject.labels(split)[: self.pictures]
        steps = 4 if self.setup.tiny else 20
        return labelled_samples(frozen, labels, seed=1, steps=steps, scale=scale, sampler="unipc")

    def exact_pictures(self, scale: float) -> Tensor:
        """Those of the exact call, drawn once."""
        if scale not in self.full:
            self.full[scale] = self.drawn(self.exact, scale)
        return self.full[scale]

    def trained(self, name: str, options: dict[str, Any], rate: float) -> Spec:
        """Trains something with the trainer itself."""
        steps = self.steps
        told = {
            **_SHARED, **options, "learning_rate": rate, "max_train_steps": steps,
            "lr_warmup_steps": steps // 10,
        }  # fmt: skip
        return train_trial(self.subject, told, self.out / "trained" / name.replace(" ", "-"))


def _no_features(images: Tensor) -> Tensor:
    raise ValueError("expected no Frechet distance in part 2, which has no classifier")


def repaired(worth: Worth, call: str, part: Part) -> None:
    """The distance of a rounded model's pictures to the full model's, with each remedy."""
    config = TrainConfig(base=worth.subject.base, student_quantization=call)
    cheap = cheap_base(worth.exact, config)
    task = {"objective": "distill", "student_quantization": call}
    _compare(worth, call, task, cheap, 1.0, part)


def guided(worth: Worth, part: Part) -> None:
    """The distance of pictures without a second call to the guided ones, with each remedy."""
    task = {"objective": "distill", "teacher_guidance_scale": GUIDED}
    _compare(worth, "guidance", task, worth.exact, GUIDED, part)


def _compare(
    worth: Worth, name: str, task: dict[str, Any], cheap: FrozenBase, scale: float, part: Part
) -> None:
    """Trains each remedy of a cheap call and compares pictures with those of the exact one."""
    target = worth.exact_pictures(scale)
    before = squared_distance(worth.drawn(cheap), target)
    part.add(f"{name}: distance of the cheap call's pictures", float(before.mean()))
    found: dict[str, Tensor] = {}
    for remedy, (options, rate) in REMEDIES.items():
        spec = worth.trained(f"{name} {remedy}", {**task, **options}, rate)
        with load_compared(spec).on(cheap) as used:
            found[remedy] = squared_distance(worth.drawn(used), target)
        gone = 1 - float(found[remedy].mean() / before.mean())
        part.add(f"{name}: gone with {remedy}", gone, "share of the picture distance")
    for remedy in list(REMEDIES)[:2]:
        mean, low, high = paired_interval(found["LoRA"], found[remedy])
        part.add(f"{name}: {remedy} minus LoRA", mean, f"95 % [{low:.5f}, {high:.5f}]")


def further(worth: Worth, objective: str, part: Part) -> None:
    """A patch on data or on own samples: what the held-out loss does."""
    held_out = worth.subject.split("validation")
    images, labels = as_float(held_out.images)[: worth.pictures], held_out.labels[: worth.pictures]
    base = labelled_losses(worth.exact, images, labels, draws=1).mean(1)
    for remedy, (options, rate) in REMEDIES.items():
        own = {"own_samples": 4 * worth.steps, "own_steps": 4} if objective == "own" else {}
        told = {"objective": objective, **own, **options}
        spec = worth.trained(f"{objective} {remedy}", told, 0.1 * rate)
        with load_compared(spec).on(worth.exact) as used:
            losses = labelled_losses(used, images, labels, draws=1).mean(1)
        mean, low, high = (100 * v / float(base.mean()) for v in paired_interval(base, losses))
        note = f"% of the base's, 95 % [{low:+.3f}, {high:+.3f}]"
        part.add(f"{objective}: held-out loss with {remedy}", mean, note)


def stages(setup: Setup, out: Path) -> list[tuple[str, float, Callable[[Part], None], bool]]:
    """Name, budget in seconds, measurement, and whether --smoke runs it, of part 2."""
    worth = Worth(setup, out / "pictures", setup.base)
    repairs = {call: (f"repair {call}", 35.0, partial(repaired, worth, call)) for call in CALLS}
    objectives = [
        (f"objective {name}", 35.0, partial(further, worth, name), name == "own")
        for name in ("data", "own")
    ]
    return [
        ("base", 20.0 if setup.base else 195.0, partial(worth.make, 165.0), True),
        (*repairs[CALLS[0]], True),
        ("guidance", 35.0, partial(guided, worth), True),
        *((*repairs[call], False) for call in CALLS[1:]),
        *objectives,
    ]
