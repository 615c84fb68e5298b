"""What can be told of a base and the options for it before anything is loaded or downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from dmp_common import Patch, get_base
from dmp_common.tools.hub import is_repository
from training.base.experts import require_expert
from training.base.families.table import family_of
from training.base.option_checks import require_options
from training.base.places import find_source, require_known
from training.base.releases import require_releases
from training.base.schedulers import require_adjustable
from training.data.kind import DataKind
from training.data.rules import make_subset, parse_resolution, values_of
from training.methods.lora_ranks import require_ranks_by_noise
from training.methods.patch import starting_patch
from training.objective.noising import require_process
from training.objective.sampling import require_sampler
from training.options.config import TrainConfig
from training.options.problems import ConfigError, problems_of

Check = Callable[[TrainConfig], object]


def _base(config: TrainConfig) -> None:
    """A base that the trainer and the installed packages know, and a place of its weights that
    exists, as far as this disk tells."""
    base = get_base(config.base)
    require_releases(base, family_of(base))
    source = find_source(config, base)
    if source.is_here:
        require_known(source)
    require_expert(config, base, source)


def _variant(config: TrainConfig) -> None:
    """The patch without memory for its values: names of sites, sizes, options of its gate."""
    get_base(config.base)
    with torch.device("meta"):
        Patch.create(config.base, **config.variant)


def _start(config: TrainConfig) -> None:
    """The patch that training starts from, where it is a file."""
    if config.network_weights is not None and not is_repository(config.network_weights):
        starting_patch(config, get_base(config.base))


def _sizes(config: TrainConfig) -> None:
    """A resolution that the base can take."""
    size = parse_resolution(config.resolution)
    if size is None or config.dataset_config is not None or config.needs_no_pictures:
        return  # a dataset file has sizes of its own; without pictures any size is cut to fit
    family = family_of(get_base(config.base))
    kind = DataKind(family.conditioning, multiple=family.multiple, square=family.square)
    make_subset(values_of(config), kind, "")


def _process(config: TrainConfig) -> None:
    """Options of the noise and its schedule, and samplers, that this kind of base has."""
    base = get_base(config.base)
    flow = base.prediction == "flow"
    checks: list[Callable[[], None]] = [
        lambda: require_adjustable(flow, config),
        lambda: require_process(flow, config),
    ]
    if config.objective == "distill" and config.states != "data":
        checks.append(lambda: require_sampler(config.state_sampler, flow, "--state_sampler"))
    if config.uses_own_samples and "own_sampler" in config.model_fields_set:
        checks.append(lambda: require_sampler(config.own_sampler, flow, "--own_sampler"))
    if config.method == "lora" and config.network_min_dim is not None:
        checks.append(lambda: require_ranks_by_noise(flow, base.name))
    problems = problems_of(checks)
    if problems:
        raise ConfigError(*problems)


def _packages(config: TrainConfig) -> None:
    """Packages that an option needs."""
    quantization = config.student_quantization or ""
    needed = {
        "peft": "--method lora" if config.method == "lora" else "",
        "gguf": f"--student_quantization {quantization}" if quantization.startswith("q") else "",
        "bitsandbytes": "--student_quantization nf4" if quantization == "nf4" else "",
        "torchao": "--int8_base" if config.int8_base else "",
    }
    if quantization in ("int8", "int4"):
        needed["torchao"] = f"--student_quantization {quantization}"
    missing = [
        f"expected the package {package} for {option}, found none: pip install {package}."
        for package, option in needed.items()
        if option and importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ConfigError(*missing)


OF_BASE: tuple[Check, ...] = (
    _base, _variant, require_options, _start, _sizes, _process, _packages,
)  # fmt: skip
