"""What can be told of a run before anything is loaded: all of it at once, in one report."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from dmp_common import PatchError, get_base
from dmp_common.bases.schedule import EVERYWHERE
from training.base.families.dit import DiT
from training.base.families.flux2 import Flux2, Flux2Klein
from training.base.families.language import LanguageFamily, Lumina2
from training.base.families.table import family_of
from training.base.families.transformer import Flux
from training.base.frozen import find_base
from training.base.option_checks import told_family
from training.data.sources.named import require_dataset_file, require_places
from training.objective.base_checks import OF_BASE, Check
from training.options.command_line import Resolved, with_base
from training.options.config import TrainConfig
from training.options.data_options import named_sources
from training.options.problems import ConfigError, problems_of
from training.run.folder import RunFolder
from training.run.optimisers import OPTIMISERS, PLAIN, has_package, make_optimiser, optimiser_name
from training.run.previews import previewed, sampler_of
from training.run.prompt_files import read_prompt_file, require_prompt_file, require_prompts
from training.run.state import find_resumed

_PATCHES = ("dmp", "prompt")
# Options about the timesteps of flow models.
_OF_FLOW = (
    "timestep_sampling", "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
    "sigmoid_scale", "discrete_flow_shift",
)  # fmt: skip


def check_run(found: Resolved) -> None:
    """Adds to a configuration's problems and warnings what files, packages and devices tell.

    The configuration is changed where this machine asks for it, with a warning each, and where the
    base is recognised from its weights.
    """
    config = found.config
    if config.base == "auto" and config.pretrained_model_name_or_path is not None:
        try:
            config = with_base(config, find_base(config).name)
        except ConfigError as error:
            found.problems += error.problems
        except PatchError as error:
            found.problems.append(str(error))
    for suit in (_suit_precision, _suit_optimiser, _suit_sampler, _suit_base, _suit_expert):
        config, warning = suit(config)
        found.warnings += [warning] if warning else []
    if config.report_samples and config.method not in _PATCHES:
        config = config.model_copy(update={"report_samples": 0})
    known = config.base != "auto"
    checks: list[Check] = list(OF_BASE) if known else []
    checks += [_data, require_dataset_file, _prompts, _folder, _optimiser, _resumed, _upload]
    more = problems_of(partial(check, config) for check in checks)
    found.problems += [problem for problem in more if problem not in found.problems]
    found.config = config


def _suit_precision(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """fp16 becomes bf16 where there is no accelerator: CPUs have no fast fp16, nor its scaler."""
    if config.mixed_precision != "fp16" or not _on_cpu(config):
        return config, None
    return config.model_copy(update={"mixed_precision": "bf16"}), (
        "--mixed_precision fp16 becomes bf16, because there is no GPU to train on."
    )


def _suit_optimiser(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """An optimiser with 8-bit states becomes the plain one where it cannot run."""
    name = optimiser_name(config.optimizer_type)
    if name not in PLAIN:
        return config, None
    if _on_cpu(config):
        why = "there is no GPU"
    elif not has_package(name):
        why = f"the package {OPTIMISERS[name][1]} is not installed"
    else:
        return config, None
    return config.model_copy(update={"optimizer_type": PLAIN[name]}), (
        f"--optimizer_type {name} becomes {PLAIN[name]}, because {why}."
    )


def _suit_sampler(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """A sampler that previews do not have becomes theirs: it changes pictures, not the patch."""
    name = config.sample_sampler
    if name in (None, "ddim") or sampler_of(name, flow=False) != "default":
        return config, None
    return config.model_copy(update={"sample_sampler": None}), (
        f"--sample_sampler {name} is not among the samplers of previews, which take ddim then."
    )


def _suit_base(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """Options for other bases become their defaults: a file shall not record what was not used."""
    try:
        base = get_base(config.base)
        family = family_of(base)
    except PatchError:  # an unknown base has a sentence of its own
        return config, None
    encoders = list(family.encoders.values())
    fitting = {
        "clip_skip": encoders == ["CLIPTextModel"],
        "max_token_length": family.denoiser == "unet",
        "t5_max_token_length": any("T5" in encoder for encoder in encoders),
        "llm_max_token_length": isinstance(family, LanguageFamily),
        "system_prompt": isinstance(family, Lumina2),
        "text_encoder": isinstance(family, LanguageFamily | DiT),
        "flux_guidance_scale": isinstance(family, Flux | Flux2)
        and not isinstance(family, Flux2Klein),
        **dict.fromkeys(_OF_FLOW, base.prediction == "flow"),
    }
    idle = {
        name: TrainConfig.model_fields[name].default
        for name, fits in fitting.items()
        if not fits and getattr(config, name) != TrainConfig.model_fields[name].default
    }
    if not idle:
        return config, None
    names = ", ".join(f"--{name}" for name in idle)
    return config.model_copy(update=idle), f"taken without effect on base {base.name}: {names}."


def _suit_expert(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """An expert is trained at the timesteps that its pipeline gives it, if no others are named."""
    with suppress(PatchError):
        base = get_base(config.base)
        asked = config.min_timestep, config.max_timestep
        if config.expert and base.switch is not None and asked == EVERYWHERE:
            own = base.timesteps_of(config.expert)
            limits = dict(zip(("min_timestep", "max_timestep"), own, strict=True))
            return config.model_copy(update=limits), (
                f"--expert {config.expert} trains at timesteps {own[0]} to {own[1]}, which are its "
                "own; --min_timestep and --max_timestep change that."
            )
    return config, None


def _on_cpu(config: TrainConfig) -> bool:
    return config.cpu or not torch.accelerator.is_available()


def _data(config: TrainConfig) -> None:
    """A source of data, and places on this disk that exist."""
    if config.needs_no_pictures:
        return
    given = named_sources(config)
    if not given and config.base == "auto" and config.pretrained_model_name_or_path is None:
        return  # who names neither a base nor data is shown whole commands already
    if not given:
        command = f"  python training/train_dmp.py {_named(config)}"
        raise PatchError(
            f"expected data to train on: the images (and captions) that base {config.base} was "
            "trained on, or their like; found none. Three commands that run, with your paths:\n"
            f"{command} --train_data_dir photos\n"
            f'{command} --webdataset "shards/{{00000..00099}}.tar"\n'
            f"{command} --dataset_name user/dataset"
        )
    require_places(config)


def _named(config: TrainConfig) -> str:
    """The words of a command line that name the base of a configuration."""
    try:
        usual = get_base(config.base).hub_id if config.base != "auto" else None
    except PatchError:  # an unknown base has a sentence of its own
        usual = None
    place = config.pretrained_model_name_or_path or (None if usual else "model.safetensors")
    weights = "" if place is None else f' --pretrained_model_name_or_path "{place}"'
    return f"--base {config.base}{weights}"


def _prompts(config: TrainConfig) -> None:
    """The prompts of previews, and what of them the base does not take."""
    file = config.sample_prompts
    entries = None if file is None else read_prompt_file(Path(file))
    try:
        base = get_base(config.base)
        family = told_family(config, base)
    except PatchError:  # an unknown base has a sentence of its own
        return
    if entries is not None:
        require_prompts(entries, base, family)
    elif previewed(config):
        require_prompt_file(family.conditioning == "caption" or config.text_conditional)


def _optimiser(config: TrainConfig) -> None:
    make_optimiser(config, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])


def _resumed(config: TrainConfig) -> None:
    if config.resume is not None:
        find_resumed(config)


def _upload(config: TrainConfig) -> None:
    if config.huggingface_repo_id is not None and config.method not in _PATCHES:
        raise PatchError(
            f"expected --huggingface_repo_id with a patch, found --method {config.method}: upload "
            "its result with the tools of diffusers."
        )


def _folder(config: TrainConfig) -> None:
    """A folder that can be written; what is made for the trial is removed, since no run is sure."""
    folder = Path(config.output_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        RunFolder(config).require_writable()
    finally:
        for path in made:
            with suppress(OSError):  # never made
                path.rmdir()
