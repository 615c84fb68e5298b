"""The lines of Python that use the result of a run, for every base, kind of weights and method.

They load the base as the run did. Where diffusers alone can, they use diffusers; for separate
files, original checkpoints and the like they use the trainer's own loader.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import diffusers
from safetensors import safe_open

from training.base.dit_folders import TIME_FILE
from training.base.families.dit import DiT, takes_text
from training.base.frozen import FrozenBase
from training.base.places import Source, find_source
from training.base.single_files import SingleFile
from training.methods.full import JointMethod
from training.options.config import TrainConfig

_REPOSITORY = Path(__file__).resolve().parents[2]
# Options that say how a base is loaded. Any of these but the first three is for our loader alone.
_OPTIONS = (
    "pretrained_model_name_or_path", "weights_variant", "mixed_precision", "base_config", "vae",
    "ae", "clip_l", "clip_g", "t5xxl", "no_half_vae", "text_conditional", "text_encoder",
    "unconditional", "v_parameterization", "zero_terminal_snr",
)  # fmt: skip
_SIMPLE = _OPTIONS[:3]
_PATHS = (
    "pretrained_model_name_or_path", "base_config", "vae", "ae", "clip_l", "clip_g", "t5xxl",
    "text_encoder",
)  # fmt: skip
_TYPES = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}


def use_lines(config: TrainConfig, frozen: FrozenBase, path: Path) -> list[str]:
    """Returns lines of Python that load the base of a run and put its result on it.

    They run from any working directory, and leave a `pipe` or, for bases without a pipeline in
    diffusers, a `model`.

    Args:
        config: of the run.
        frozen: its base, without anything attached.
        path: of the result, which exists.
    """
    result = path.resolve()
    if config.has_student and not config.trains_base:
        return _with_imports(_repaired(config, frozen, result))
    base = _trained(config, frozen, result) if config.trains_base else _base(config, frozen)
    name = "pipe" if frozen.family.pipeline else "model"
    if config.method == "lora":
        after = _lora(frozen, result)
    elif config.method == "full":
        after = []
    else:
        file = result / JointMethod.patch_file if config.method == "joint" else result
        after = [f"dmp.attach({name}, dmp.Patch.load({_text(file)}))"]
    return _with_imports([*base, *after])


def _repaired(config: TrainConfig, frozen: FrozenBase, result: Path) -> list[str]:
    """The cheap model as the run made it, with the result on it."""
    given = _given(config) | {
        name: _resolved(str(value)) if name == "student_weights" else value
        for name in ("student_weights", "student_quantization")
        if (value := getattr(config, name)) is not None
    }
    options = ", ".join(f"{key}={_text(value)}" for key, value in given.items())
    ending = "pipeline()" if frozen.family.pipeline else "model"
    name = "pipe" if frozen.family.pipeline else "model"
    line = f"{name} = open_cheap(base={_text(frozen.base.name)}, {options}).{ending}"
    if config.method == "lora":
        return [line, *_lora(frozen, result)]
    return [line, f"dmp.attach({name}, dmp.Patch.load({_text(result)}))"]


def _with_imports(lines: list[str]) -> list[str]:
    code = "\n".join(lines)
    modules = {"diffusers": "diffusers.", "dmp_common as dmp": "dmp.", "torch": "torch."}
    names = [name for name, use in modules.items() if use in code]
    imports = [f"import {', '.join(names)}"] if names else []
    ours = "open_base(" in code or "open_cheap(" in code
    if "open_base(" in code:
        imports.append("from training.base.frozen import open_base")
    if "open_cheap(" in code:
        imports.append("from training.base.cheap import open_cheap")
    if ours or ("dmp." in code and not _is_installed()):
        imports.insert(0, f"import sys; sys.path.insert(0, {_text(_REPOSITORY)})")
    return [*imports, *lines]


def _is_installed() -> bool:
    try:
        distribution("diffusion-model-patching")
    except PackageNotFoundError:
        return False
    return True


def _base(config: TrainConfig, frozen: FrozenBase) -> list[str]:
    """The base as it was loaded."""
    source, family = find_source(config, frozen.base), frozen.family
    given, place = _given(config), _text(_resolved(source.place))
    if set(given) - set(_SIMPLE) or _needs_loader(source, frozen):
        return [_opened(frozen, given)]
    options = _dtype(config)
    if source.kind == "single":
        return [f"pipe = diffusers.{family.pipeline}.from_single_file({place}{options})"]
    if config.weights_variant:
        options += f", variant={_text(config.weights_variant)}"
    if family.pipeline:
        return [f"pipe = diffusers.{family.pipeline}.from_pretrained({place}{options})"]
    if source.kind == "pipeline":
        options = f", subfolder={_text(family.denoiser)}{options}"
    model = f"model = diffusers.{family.model}.from_pretrained({place}{options})"
    return [model, *_shift(frozen, Path(source.place))]


def _needs_loader(source: Source, frozen: FrozenBase) -> bool:
    """Whether diffusers alone cannot load the weights as the trainer does."""
    path, family = Path(source.place), frozen.family
    if source.kind == "original" or family.conditioner:  # its pipeline loads parts by another call
        return True
    if source.kind == "single":
        with SingleFile(path) as file:
            parts = ["vae", *(family.files.get(name) for name in family.encoders)]
            whole = not file.is_original and all(part and file.has(part) for part in parts)
        reads = hasattr(getattr(diffusers, family.pipeline, None), "from_single_file")
        return path.suffix == ".ckpt" or not whole or not reads
    if family.pipeline:
        folder = path.is_dir()
        return source.kind == "denoiser" or (folder and not (path / "model_index.json").is_file())
    return _has_text(frozen)


def _has_text(frozen: FrozenBase) -> bool:
    """Whether it is a DiT with a text embedding, which diffusers does not know."""
    return isinstance(frozen.family, DiT) and takes_text(frozen.model)


def _trained(config: TrainConfig, frozen: FrozenBase, result: Path) -> list[str]:
    """The weights that --method full and joint trained, with the parts around them."""
    family = frozen.family
    if family.pipeline or _has_text(frozen):
        given = _given(config) | {"pretrained_model_name_or_path": result.as_posix()}
        if "base_config" not in given and family.pipeline:
            around = find_source(config, frozen.base)
            if around.kind == "pipeline":
                given["base_config"] = _resolved(around.place)
        return [_opened(frozen, given)]
    place, part = _text(result), _text(family.denoiser)
    model = f"model = diffusers.{family.model}.from_pretrained({place}, subfolder={part})"
    return [model, *_shift(frozen, result)]


def _shift(frozen: FrozenBase, folder: Path) -> list[str]:
    """The constant of a DiT's time embedding, where it is not the one of diffusers."""
    if not (folder / TIME_FILE).is_file():
        return []
    shift = frozen.facts["frequency_shift"]
    return [
        "for block in model.transformer_blocks:",
        f"    block.norm1.emb.time_proj.downscale_freq_shift = {shift}",
    ]


def _lora(frozen: FrozenBase, result: Path) -> list[str]:
    if frozen.family.pipeline:
        return [f"pipe.load_lora_weights({_text(result)})"]
    prefix = f"{frozen.family.denoiser}."
    with safe_open(result, framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    settings = ", ".join(f"{key.removeprefix(prefix)}={value!r}" for key, value in told.items())
    return [
        "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
        "from safetensors.torch import load_file",
        f"inject_adapter_in_model(LoraConfig({settings}), model)",
        f"tensors = load_file({_text(result)})",
        f"tensors = {{key.removeprefix({_text(prefix)}): value for key, value in tensors.items()}}",
        "set_peft_model_state_dict(model, tensors)",
    ]


def _opened(frozen: FrozenBase, given: dict[str, object]) -> str:
    """The line for the trainer's own loader."""
    options = ", ".join(f"{key}={_text(value)}" for key, value in given.items())
    ending = "pipeline()" if frozen.family.pipeline else "model"
    name = "pipe" if frozen.family.pipeline else "model"
    return f"{name} = open_base(base={_text(frozen.base.name)}, {options}).{ending}"


def _given(config: TrainConfig) -> dict[str, object]:
    """The options that say how the base is loaded, where they are not the defaults."""
    fields = type(config).model_fields
    chosen = {name: getattr(config, name) for name in _OPTIONS}
    return {
        name: _resolved(str(value)) if name in _PATHS else value
        for name, value in chosen.items()
        if value != fields[name].default
    }


def _resolved(place: str) -> str:
    """A path as it is found from anywhere; a hub id as it is."""
    path = Path(place).expanduser()
    return path.resolve().as_posix() if path.exists() else place


def _dtype(config: TrainConfig) -> str:
    name = _TYPES.get(config.mixed_precision)
    return f", torch_dtype={name}" if name else ""


def _text(value: object) -> str:
    """A value as Python writes it; paths and texts in double quotes."""
    if isinstance(value, Path):
        value = value.as_posix()
    if not isinstance(value, str):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
