"""From a command line to a configuration.

A value comes from the command line, else from the TOML file (--config_file), else from the recipe,
else from the preset of the base, else from the default.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from training.options.config import SECRETS, TrainConfig
from training.options.presets import ELSEWHERE, PRESETS, RECIPES, SOURCES, VARIANTS


class ConfigError(Exception):
    """What is wrong with a configuration, in one sentence."""


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration a command line asks for; exits with a message where it is wrong."""
    parser = _parser()
    found, unknown = parser.parse_known_args(arguments)
    try:
        if unknown:
            raise ConfigError(explain_unknown(unknown))
        config = resolve(vars(found))
        if config.output_config is not None:
            _write(config)
    except ConfigError as error:
        parser.error(str(error))
    if config.output_config is not None:
        parser.exit(0)
    return config


def resolve(given: dict[str, Any]) -> TrainConfig:
    """The configuration of options given by name, with its TOML file, recipe and preset.

    Raises:
        ConfigError: an unknown name, a value that is none, or options that exclude each other.
    """
    file = given.get("config_file")
    chosen = {**(read_toml(Path(file)) if file else {}), **given}
    return _validated(chosen, str(chosen.get("base", TrainConfig.model_fields["base"].default)))


def with_base(config: TrainConfig, base: str) -> TrainConfig:
    """The same wishes for another base, with that base's preset (for --base auto)."""
    chosen = {name: getattr(config, name) for name in config.model_fields_set}
    for name, text in (("output_dir", config.base), ("output_name", config.base)):
        if name in chosen:
            chosen[name] = chosen[name].replace(text, base.replace("/", "-"))
    return _validated({**chosen, "base": base}, base)


def _validated(chosen: dict[str, Any], base: str) -> TrainConfig:
    preset = dict(PRESETS.get(base, {}))
    if any(chosen.get(name) for name in SOURCES):
        preset.pop("dataset_name", None)  # other data were asked for
    if chosen.get("method", "dmp") == "dmp":
        preset |= VARIANTS.get(base, {})
    recipe = RECIPES.get(str(chosen.get("recipe", "none")), {})
    try:
        return TrainConfig(**{**preset, **recipe, **chosen})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ConfigError(first["msg"].removeprefix("Value error, ")) from error
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ConfigError(_explain_name(name)) from error
        raise ConfigError(f"--{name}: {first['msg']}, found {first['input']!r:.200}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Options of a TOML file. Tables only group them, as in kohya's files: names are unique.

    Raises:
        ConfigError: no such file, bad TOML, an unknown name, or one given twice.
    """
    # Here, because `--help` does without torch.
    from dmp_common.errors import PatchError, printable
    from dmp_common.patch.serialize import opened
    from training.options.toml_files import parse_toml

    path = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    try:
        with opened(path, "a TOML file") as (file, _):
            contents = parse_toml(file.read(), path)
    except PatchError as error:
        raise ConfigError(f"--config_file: {error}") from error
    flat: dict[str, Any] = {}
    for name, value in contents.items():
        for key, entry in value.items() if isinstance(value, dict) else ((name, value),):
            if key in flat:
                raise ConfigError(f"{path}: {printable(key)} is given twice: give it once")
            if key not in TrainConfig.model_fields:
                raise ConfigError(f"{path}: {_explain_name(key)}")
            flat[key] = entry
    return flat


def as_toml(config: TrainConfig) -> str:
    """Every option of a configuration as TOML, by section; those without value as comments."""
    lines: list[str] = []
    for section, names in sections(TrainConfig).items():
        lines += ["", f"[{section.replace(' ', '_')}]"]
        for name in names:
            value = getattr(config, name)
            if name in SECRETS or name in ("config_file", "output_config"):
                continue
            # JSON's text, numbers and lists are TOML's too.
            written = json.dumps(value, ensure_ascii=False)
            lines.append(f"# {name} =" if value is None else f"{name} = {written}")
    return "\n".join(lines[1:]) + "\n"


def _write(config: TrainConfig) -> None:
    text = as_toml(config)
    if config.output_config == "-":
        print(text, end="")
        return
    path = Path(str(config.output_config))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"--output_config: {path} exists already: name another file, or take it away"
        ) from None
    except OSError as error:
        raise ConfigError(f"--output_config: {path}: {error.strerror}") from error


def explain_unknown(unknown: Sequence[str], known: Iterable[str] = TrainConfig.model_fields) -> str:
    """What to say of options that a parser does not know."""
    for entry in unknown:
        if entry.startswith("--"):
            return _explain_name(entry.split("=")[0].strip("-"), known)
    return f"expected options that begin with --, found {unknown[0]!r}"


def _explain_name(name: str, known: Iterable[str] = TrainConfig.model_fields) -> str:
    if name in ELSEWHERE:
        return f"--{name} has no use here: {ELSEWHERE[name]}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown option --{name}" + (f", did you mean --{near[0]}?" if near else ", see --help")


def sections(options: type[BaseModel]) -> dict[str, list[str]]:
    """The names of options by their heading in --help."""
    found: dict[str, list[str]] = {}
    for name, info in options.model_fields.items():
        section = str(info.json_schema_extra["section"])  # type: ignore[index, call-overload]
        found.setdefault(section, []).append(name)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_dmp.py",
        usage="%(prog)s --base NAME [options]",
        description="Trains a DMP patch for a frozen diffusion model. "
        "docs/TRAINING.md is the guide.",
        epilog="Examples: train_dmp.py --base digits | train_dmp.py --base sd15 --train_data_dir "
        "images --dry_run | accelerate launch train_dmp.py --config_file run.toml",
        allow_abbrev=False,
    )
    add_options(parser, TrainConfig, list(TrainConfig.model_fields))
    return parser


def add_options(
    parser: argparse.ArgumentParser, options: type[BaseModel], names: Sequence[str]
) -> None:
    """Adds options by name to a parser, under their headings."""
    for section, members in sections(options).items():
        chosen = [name for name in members if name in names]
        if chosen:
            group = parser.add_argument_group(section)
            for name in chosen:
                _add_option(group, name, options.model_fields[name])


def _add_option(group: Any, name: str, info: FieldInfo) -> None:
    kinds = get_args(info.annotation) or (info.annotation,)
    default = "" if info.default is None or info.default == [] else f" (default: {info.default})"
    options: dict[str, Any] = {"help": f"{info.description}{default}"}
    if info.annotation is bool:
        # Also --no-name, so that a command line can switch off what a TOML file switches on.
        switch = argparse.BooleanOptionalAction
        options["action"] = "store_true" if name.startswith("no_") else switch
        options["help"] = f"{info.description}{' (default: on)' if info.default else ''}"
    elif name == "model":
        options |= {"action": "append", "metavar": "LABEL=KIND:PATH"}
    elif get_origin(info.annotation) is list:
        options |= {"nargs": "*", "metavar": "NAME=VALUE"}
    else:
        choices = [c for kind in kinds for c in (get_args(kind) or (kind,)) if _is_choice(c)]
        if choices:
            options |= {"choices": choices, "type": type(choices[0])}
        else:
            named = next(kind for kind in kinds if isinstance(kind, type))
            options["metavar"] = named.__name__.upper()
        if name == "output_config":
            options |= {"nargs": "?", "const": "-"}
    # Absent options stay absent, so that a preset is not overruled by a default.
    group.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)


def _is_choice(value: object) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, (type, bool))


__all__ = [
    "ConfigError",
    "add_options",
    "as_toml",
    "explain_unknown",
    "parse_arguments",
    "read_toml",
    "resolve",
    "sections",
    "with_base",
]
