"""What a run on the digits base did, in pictures and numbers: test data, base beside patched."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dmp_common import Patch, attach
from dmp_common.tools.heatmap import save_heatmap
from dmp_common.tools.timefile import even_timesteps, time_embedding_of
from training.base.frozen import FrozenBase
from training.data.sources.digits_images import NUM_CLASSES, DigitsSplit, load_digits_split
from training.objective.digit_classifier import load_digit_classifier
from training.objective.frechet import frechet_distance
from training.objective.labelled import labelled_losses, labelled_samples
from training.options.config import TrainConfig
from training.run.state import History

BINS = 10
_DRAWS = 8  # of timestep and noise for each test image and bin
_SAMPLER, _STEPS = "unipc", 20  # a good sampler at a usual number of steps
_SAMPLE_SEED = 1234  # the same noise for base and patched
_OF_GUIDANCE = (
    "",
    "The patch predicts with one call what guidance predicts with two. Guidance departs from the "
    "data on purpose, so the denoising losses, of single calls, do not tell how good the patch is.",
)


@dataclass(frozen=True)
class DigitsMeasures:
    """What one model did on the test split.

    Args:
        loss_by_bin: denoising loss in ten equal ranges of timesteps, least noisy first.
        frechet_distance: of generated images to the test images.
    """

    loss_by_bin: list[float]
    frechet_distance: float

    @property
    def loss(self) -> float:
        """Denoising loss over all timesteps."""
        return sum(self.loss_by_bin) / len(self.loss_by_bin)


def write_digits_report(
    config: TrainConfig, frozen: FrozenBase, patch: Patch, history: History, folder: Path
) -> None:
    """Writes samples.png, gate.png, report.md and report.json.

    A patch that takes the place of guidance is compared with that guidance, two calls a step.

    Args:
        patch: as loaded from its file, attached here and removed again.
        history: of the training.
        folder: exists and is writable.
    """
    test = load_digits_split("test")
    # As often as needed the labels of the test split: equal class proportions on both sides.
    labels = test.labels.repeat(-(-config.report_samples // len(test)))
    scale = patch.variant.guidance or 1.0
    base, before = _measure(frozen, test, labels, scale)
    with attach(frozen.model, patch):
        patched, after = _measure(frozen, test, labels)
    floor = _features_distance(load_digits_split("train").images, test.images)

    _sample_grid(test.labels, before, after).save(folder / "samples.png")
    timesteps = even_timesteps()
    label = 0 if patch.variant.condition == "t+y" else None
    e = time_embedding_of(frozen.model, patch, timesteps, label)
    save_heatmap(folder / "gate.png", patch, timesteps, e)
    text = _text(config, history, base, patched, floor, len(labels), scale)
    (folder / "report.md").write_text(text, encoding="utf-8")
    numbers = {
        "base": asdict(base),
        "patched": asdict(patched),
        "frechet_distance_of_training_images": floor,
        "samples": len(labels),
        "validation_loss_of_base": history.base_mean,
        "validation_loss_by_step": {step: history.mean(step) for step in history.validation},
        "kept_step": history.best_step,
        "config": config.recorded(),
    }
    (folder / "report.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    print(
        f"\ntest split: denoising loss {base.loss:.5f} -> {patched.loss:.5f} "
        f"({patched.loss / base.loss - 1:+.2%}), Frechet distance {base.frechet_distance:.2f} -> "
        f"{patched.frechet_distance:.2f} ({len(labels)} samples; training images: {floor:.2f}"
        f"{'; before: with guidance, two calls a step' if scale != 1 else ''})\n"
        f"samples.png, gate.png, report.md and report.json are in {folder.as_posix()}"
    )


def _measure(
    frozen: FrozenBase, test: DigitsSplit, labels: Tensor, scale: float = 1.0
) -> tuple[DigitsMeasures, Tensor]:
    """Measures of the model as it is now, and its samples (B, 1, 8, 8) at a scale of guidance."""
    losses = labelled_losses(frozen, test.images, test.labels, bins=BINS, draws=_DRAWS, seed=1)
    images = labelled_samples(
        frozen, labels, seed=_SAMPLE_SEED, steps=_STEPS, sampler=_SAMPLER, scale=scale
    )
    return DigitsMeasures(losses.mean(0).tolist(), _features_distance(images, test.images)), images


def _features_distance(images: Tensor, reference: Tensor) -> float:
    classifier = load_digit_classifier()
    with torch.no_grad():
        return frechet_distance(classifier.features(images), classifier.features(reference))


def _sample_grid(labels: Tensor, before: Tensor, after: Tensor, columns: int = 8) -> Image.Image:
    """One row a class: samples of the base left, of the patched model right, from equal noise."""
    classes = [torch.nonzero(labels == digit)[:, 0] for digit in range(NUM_CLASSES)]
    half = [
        torch.stack([images[of_class][:columns] for of_class in classes])
        for images in (before, after)
    ]  # each (10, columns, 1, 8, 8)
    gap = torch.ones(NUM_CLASSES, 1, *half[0].shape[2:])
    cells = torch.cat([half[0], gap, half[1]], dim=1)[:, :, 0]  # (10, 2 columns + 1, 8, 8)
    cells = torch.nn.functional.pad(cells, (1, 1, 1, 1), value=1.0)
    picture = cells.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # rows of pixels
    grey = ((1.0 - (picture + 1.0) / 2.0) * 255).round().to(torch.uint8)
    grey[picture == 1.0] = 255
    image = Image.fromarray(grey.numpy())
    return image.resize((image.width * 5, image.height * 5), Image.Resampling.NEAREST)


def _against_base(history: History) -> str:
    change = history.mean(history.best_step) / history.base_mean - 1
    return f"validation loss {change:+.2%} against the base"


def _text(
    config: TrainConfig,
    history: History,
    base: DigitsMeasures,
    patched: DigitsMeasures,
    floor: float,
    samples: int,
    scale: float,
) -> str:
    guided = scale != 1
    sides = ("two calls", "the patch") if guided else ("base", "patched")
    what = f"the base with guidance of {scale:g}, two calls a step," if guided else "the base,"
    rows = [
        f"| {100 * n}-{100 * n + 99} | {b:.5f} | {p:.5f} | {p / b - 1:+.2%} |"
        for n, (b, p) in enumerate(zip(base.loss_by_bin, patched.loss_by_bin, strict=True))
    ]
    denoising = [
        f"| denoising loss | {base.loss:.5f} | {patched.loss:.5f} "
        f"| {patched.loss / base.loss - 1:+.2%} |"
    ]
    validation = [f"| {step} | {history.mean(step):.5f} |" for step in history.validation]
    return "\n".join(
        [
            f"# {config.output_name}: what the patch did",
            "",
            f"Trained for {config.max_train_steps} steps on the training split; validation kept "
            f"step {history.best_step} ({_against_base(history)}). Everything below is on the test "
            f"split, which chose nothing. One run with seed {config.seed}: a small difference may "
            "be chance.",
            "",
            f"| | {sides[0]} | {sides[1]} | change |",
            "|---|---|---|---|",
            *(denoising if not guided else ()),
            f"| Frechet distance ({samples} samples, {_STEPS} steps of UniPC) "
            f"| {base.frechet_distance:.3f} | {patched.frechet_distance:.3f} "
            f"| {patched.frechet_distance / base.frechet_distance - 1:+.2%} |",
            "",
            f"The training images themselves have Frechet distance {floor:.3f} to the test images, "
            "so there is little to gain below that. Features are those of the bundled "
            "classifier.",
            *(_OF_GUIDANCE if guided else ()),
            "",
            "![samples](samples.png)",
            "",
            f"Left {what} right the patched model, from the same noise; one row a class.",
            "",
            "![gate](gate.png)",
            "",
            "## Denoising loss by timestep",
            "",
            "| timesteps | base | patched | change |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Validation loss by step",
            "",
            "Step 0 is the base.",
            "",
            "| step | loss |",
            "|---|---|",
            *validation,
            "",
        ]
    )
