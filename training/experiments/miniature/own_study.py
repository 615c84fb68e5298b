"""Away from the base's own samples, beside epsilon scaling, which needs no training (digits).

    python -m training.experiments.miniature.own_study --out DIR

Trains `--objective own` and `two-sided` for each seed, chooses strength and factor by the Frechet
distance to the validation split, and reports that to the test split, UniPC with 10 steps.

Source: Ning et al. 2024, arXiv 2308.15321 (epsilon scaling: the predicted noise times a factor).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dmp_common import Patch, attach
from training.base.frozen import FrozenBase, load_frozen
from training.experiments.miniature.cifar import SplitName
from training.experiments.miniature.pretraining import as_float
from training.experiments.miniature.subjects import Subject, digits
from training.experiments.miniature.trial import train_trial
from training.objective.frechet import frechet_distance
from training.objective.labelled import labelled_samples
from training.objective.scaling import epsilon_scaled
from training.options.config import TrainConfig

STEPS, SAMPLES = 10, 1000
NOISE = {"validation": 1, "test": 2}  # seed of the noise that samples begin with
FACTORS = (0.96, 0.965, 0.97, 0.975, 0.98, 0.985, 0.99, 1.0)
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
METHODS: dict[str, dict[str, Any]] = {
    "own samples alone": {"objective": "own"},
    "two-sided": {"objective": "two-sided"},
}
TRAINING: dict[str, Any] = {
    "recipe": "none",
    "grids": 1,
    "gate_unit": "prompt",
    "gate_form": "softmax",
    "max_train_steps": 120,
    "train_batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "ema_decay": 0.0,
    "keep_best": False,
    "report_samples": 0,
    "own_steps": STEPS,
}


def distance(subject: Subject, frozen: FrozenBase, split: SplitName) -> float:
    """The Frechet distance of samples to a split."""
    labels = subject.labels(split)[:SAMPLES]
    drawn = labelled_samples(frozen, labels, seed=NOISE[split], steps=STEPS, sampler="unipc")
    real = subject.features(as_float(subject.split(split).images))
    return frechet_distance(subject.features(drawn), real)


def best_dial(
    measure: Callable[[float, SplitName], float], dials: Iterable[float]
) -> tuple[float, float, float]:
    """The dial that is best on the validation split, and the distances with it.

    Returns:
        The dial, the distance to the validation split, and to the test split.
    """
    found = {dial: measure(dial, "validation") for dial in dials}
    best = min(found, key=lambda dial: found[dial])
    return best, found[best], measure(best, "test")


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=TRAINING["max_train_steps"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    subject = digits()
    place = str(subject.weights)
    frozen = load_frozen(TrainConfig(base="digits", pretrained_model_name_or_path=place))

    def scaled(factor: float, split: SplitName) -> float:
        with epsilon_scaled(frozen, 1 / factor):
            return distance(subject, frozen, split)

    rows: dict[str, list[tuple[float, float, float]]] = {
        "base": [best_dial(scaled, [1.0])],
        "epsilon scaling": [best_dial(scaled, FACTORS)],
    }
    for name, changes in METHODS.items():
        for seed in options.seeds:
            told = {**TRAINING, **changes, "seed": seed, "max_train_steps": options.steps}
            folder = options.out / f"{changes['objective']}-{seed}"
            patch = Patch.load(train_trial(subject, told, folder).path)

            def patched(strength: float, split: SplitName, patch: Patch = patch) -> float:
                with attach(frozen.model, patch, strength=strength):
                    return distance(subject, frozen, split)

            rows.setdefault(name, []).append(best_dial(patched, STRENGTHS))
    print(own_table(rows))
    return 0


def own_table(rows: Mapping[str, list[tuple[float, float, float]]]) -> str:
    """The results as Markdown: chosen factor or strength, and the mean over the seeds."""
    lines = ["| | chosen | validation | test | test, mean |", "|---" * 5 + "|"]
    for name, found in rows.items():
        dials = ", ".join(f"{dial:g}" for dial, _, _ in found)
        validation = ", ".join(f"{value:.3f}" for _, value, _ in found)
        test = ", ".join(f"{value:.3f}" for _, _, value in found)
        mean = statistics.mean(value for _, _, value in found)
        lines.append(f"| {name} | {dials} | {validation} | {test} | {mean:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
