"""The factor of epsilon scaling, chosen on validation images (--epsilon_scale tune)."""

from __future__ import annotations

from training.base.frozen import FrozenBase
from training.evaluation.features import Features
from training.evaluation.generating import generate
from training.evaluation.prepare import Evaluation
from training.evaluation.spec import How
from training.objective.grid_search import Choice, best_inside
from training.objective.scaling import epsilon_scaled

# Ning et al. 2024 use 1.001 to 1.03; what a smaller factor does shows that 1 is not an edge.
GRID = (0.99, 1.0, 1.01, 1.02)
_NAME = "epsilon scale"  # what the noise depends on: no other samples have it


def tuned_epsilon(evaluation: Evaluation, frozen: FrozenBase, how: How) -> Choice:
    """The factor with the smallest Frechet distance of samples to the validation images.

    Samples of all factors are from equal noise, which is not that of the samples in the report.

    Args:
        frozen: the base, with whatever is on it.
        how: the samples are drawn, but for the factor.
    """
    chosen_on, extractor = evaluation.validation, evaluation.extractor
    assert chosen_on is not None, "prepare_evaluation opens it where a row is tuned"
    assert extractor is not None, "as above"
    count = evaluation.options.epsilon_samples

    def distance(factor: float) -> float:
        with epsilon_scaled(frozen, factor):
            drawn = [
                extractor(batch.pictures)
                for batch in generate(
                    evaluation, frozen, how, chosen_on.images, count, purpose=(_NAME,)
                )
            ]
        return chosen_on.reference.distance(Features.joined(drawn).pooled, "the samples")

    return best_inside(distance, GRID)
