"""What can be told of an evaluation before anything is loaded: all of it at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

from dmp_common import Base, PatchError, get_base
from training.base.families.family import Family
from training.base.option_checks import told_family
from training.data.sources.named import require_dataset_file, require_places
from training.evaluation.settings import EvaluationOptions, as_epsilon
from training.evaluation.spec import Spec
from training.objective.base_checks import OF_BASE
from training.objective.sampling import require_sampler
from training.objective.scaling import require_scalable
from training.options.config import TrainConfig
from training.options.data_options import SOURCES
from training.options.problems import ConfigError, problems_of


def check_evaluation(options: EvaluationOptions, config: TrainConfig) -> None:
    """Refuses what options, installed packages and this disk show to be wrong.

    Args:
        config: whose base is known.

    Raises:
        ConfigError: a line for each problem.
    """
    of_config = (*OF_BASE, _source, require_places, require_dataset_file)
    checks: list[Callable[[], object]] = [partial(check, config) for check in of_config]
    checks += [partial(Spec.parse, text) for text in options.model]
    checks += [partial(_rows, options, config), partial(_packages, options)]
    problems = problems_of(checks)
    if problems:
        raise ConfigError(*problems)


def _source(config: TrainConfig) -> None:
    if not any(getattr(config, name) for name in SOURCES):
        raise PatchError(
            f"expected held-out images for base {config.base}, found none: give "
            f"{', '.join('--' + name for name in SOURCES)}."
        )


def _rows(options: EvaluationOptions, config: TrainConfig) -> None:
    """How the samples of each row are drawn, as far as the base's kind of model tells."""
    base = get_base(config.base)
    family = told_family(config, base)
    specs = []
    for text in options.model:
        try:
            specs.append(Spec.parse(text))
        except PatchError:  # it has a sentence of its own
            continue
    problems = problems_of(
        check
        for spec in [Spec("", "base", ""), *specs]
        for check in _row(options, spec, base, family)
        if options.samples
    )
    if problems:
        raise ConfigError(*problems)


def _row(
    options: EvaluationOptions, spec: Spec, base: Base, family: Family
) -> Iterator[Callable[[], object]]:
    own, flow = spec.settings, base.prediction == "flow"
    scale = options.guidance_scale if own.guidance is None else own.guidance
    yield partial(require_sampler, own.sampler or options.sampler, flow)
    yield partial(family.require_scale, 1.0 if scale is None else scale, base.name)
    if as_epsilon(own.epsilon or options.epsilon_scale) != 1:
        yield partial(require_scalable, flow, base.name)


def _packages(options: EvaluationOptions) -> None:
    """Packages that are needed at the end."""
    needed = ["matplotlib"]
    if options.samples and "kid" in options.wanted:
        needed.append("torchmetrics")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise PatchError(
            f"expected the packages of the evaluation, found no {' and no '.join(missing)}: "
            'pip install -e ".[evaluation]".'
        )
