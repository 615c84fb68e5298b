"""From a command line to a configuration.

A value comes from the command line, else from the TOML file (--config_file), else from the recipe,
else from the preset of the base, else from the default. Everything that is wrong is told at once.

The parts: `words.py` reads words, `kohya.py` and `taking.py` know names that are not ours,
`agreement.py` knows what does not go together, `presets.py` what suits a base.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from training.options.agreement import disagreements
from training.options.config import RUN_ONLY, TrainConfig
from training.options.data_options import SOURCES
from training.options.dataset_file import batch_of_file
from training.options.helping import add_options, sections
from training.options.kohya import is_off
from training.options.model_options import BASES
from training.options.presets import RECIPES, suggestions
from training.options.problems import ConfigError, numbered
from training.options.sentences import sentence_of
from training.options.taking import take, translated
from training.options.words import read_words

_EXAMPLES = (
    "Three commands that run, with your paths:\n"
    "  python training/train_dmp.py --base digits\n"
    "  python training/train_dmp.py --base sd15 --train_data_dir photos\n"
    "  python training/train_dmp.py --pretrained_model_name_or_path model.safetensors "
    "--train_data_dir photos"
)


@dataclass
class Resolved:
    """A configuration, and what there is to say about it.

    Args:
        config: of all options that are right.
        problems: sentences about the others; none if the configuration is usable.
        warnings: sentences about what is taken differently from what was written.
    """

    config: TrainConfig
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse_arguments(
    arguments: Sequence[str] | None = None, check: Callable[[Resolved], None] | None = None
) -> TrainConfig:
    """The configuration that a command line asks for; exits with a report where it is wrong.

    Args:
        arguments: words of the command line; those of this process if None.
        check: looks at what only other parts of the trainer know, and adds its own problems,
            warnings and changes.

    Raises:
        ConfigError: problems that only `check` found.
    """
    words = read_words(sys.argv[1:] if arguments is None else arguments, TrainConfig.model_fields)
    if words.help is not None:
        _parser(words.help).print_help()
        raise SystemExit(0)
    found = read_options(words.values, _EXAMPLES)
    found.problems = [*words.problems, *found.problems]
    written = found.config.output_config
    _be_strict(found)
    if written is not None and not found.problems:
        found.problems += _write(found.config, written)
    wrong = bool(found.problems)  # the command line itself
    if check is not None and written is None:
        check(found)
        _be_strict(found)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all processes of a machine
        for warning in found.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if wrong:
            print(f"error: {numbered(found.problems)}", file=sys.stderr)
    if wrong:
        raise SystemExit(2)
    if written is not None:
        raise SystemExit(0)
    if found.problems:
        raise ConfigError(*found.problems)
    return found.config


def _be_strict(found: Resolved) -> None:
    """With --strict, warnings are problems."""
    if found.config.strict:
        found.problems += found.warnings
        found.warnings = []


def resolve(given: dict[str, Any]) -> TrainConfig:
    """The configuration of options given by name, with its TOML file, recipe and preset.

    Raises:
        ConfigError: an unknown name, a value that is none, or options that exclude each other.
    """
    found = read_options(given)
    if found.problems:
        raise ConfigError(*found.problems)
    return found.config


def read_options(given: dict[str, Any], examples: str = "") -> Resolved:
    """The configuration of options given by name, and all that is wrong with them.

    Args:
        given: values by name.
        examples: what to show somebody who names neither a base nor data.
    """
    problems: list[str] = []
    warnings: list[str] = []
    chosen: dict[str, Any] = {}
    if not is_off(given.get("config_file")):
        try:
            chosen |= translated(read_toml(Path(str(given["config_file"]))), problems)
        except ConfigError as error:
            problems += error.problems
    chosen |= translated(given, problems)
    chosen = take(chosen, problems, warnings)
    if is_off(chosen.get("base")):
        chosen.pop("base", None)
        if is_off(chosen.get("pretrained_model_name_or_path")):
            problems.append(_no_base(chosen, examples))
    chosen |= batch_of_file(chosen)
    config = _validated(chosen, problems, warnings)
    problems += disagreements(config)
    return Resolved(config, problems, warnings)


def _no_base(chosen: dict[str, Any], examples: str) -> str:
    remedy = "or weights with --pretrained_model_name_or_path, which are then recognised"
    text = f"expected --base with the model to patch, found none: give one of {BASES}, {remedy}."
    return text if any(map(chosen.get, SOURCES)) else f"{text} {examples}".rstrip()


def with_base(config: TrainConfig, base: str) -> TrainConfig:
    """The same wishes for another base, with that base's preset (for --base auto).

    Raises:
        ConfigError: options that do not go together for this base.
    """
    chosen = {name: getattr(config, name) for name in config.model_fields_set}
    problems: list[str] = []
    found = _validated({**chosen, "base": base}, problems, [])
    problems += disagreements(found)
    if problems:
        raise ConfigError(*problems)
    return found


def _validated(chosen: dict[str, Any], problems: list[str], warnings: list[str]) -> TrainConfig:
    """The configuration of the values that are right; the others become problems.

    A value that is off (false, empty, 0) where the option knows no such value means that the
    option is not given, as in the files that kohya's user interface writes.
    """
    chosen, unset = dict(chosen), []
    for name, value in chosen.items():
        if value == "" and _is_optional(name):
            chosen[name] = None
            unset.append(name)
    while True:
        chosen = {n: v for n, v in chosen.items() if not (n == "recipe" and v is None)}
        try:
            config = TrainConfig(**{**suggestions(chosen), **chosen})
            break
        except ValidationError as error:
            for name in dict.fromkeys(str(entry["loc"][0]) for entry in error.errors()):
                value = chosen.pop(name)
                if not is_off(value):
                    problems.append(sentence_of(name, error))
                elif _is_optional(name):
                    chosen[name] = None
                else:
                    unset.append(name)
    if unset:
        names = ", ".join(f"--{name}" for name in unset)
        warnings.append(f"empty values and 0 count as not given: {names}.")
    # pydantic also counts what presets and recipes set; `with_base` must not take it for wishes.
    config.model_fields_set.intersection_update(chosen)
    return config


def _is_optional(name: str) -> bool:
    return type(None) in get_args(TrainConfig.model_fields[name].annotation)


def read_toml(path: Path) -> dict[str, Any]:
    """Options of a TOML file. Tables only group them, as in kohya's files: names are unique.

    Raises:
        ConfigError: no such file, bad TOML, or a name that is given twice.
    """
    # Here, because `--help` does without torch.
    from dmp_common.errors import PatchError, printable
    from training.options.toml_files import read_toml_file

    path = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    try:
        contents = read_toml_file(path)
    except PatchError as error:
        raise ConfigError(f"--config_file: {error}") from error
    flat: dict[str, Any] = {}
    twice = []
    for name, value in contents.items():
        for key, entry in value.items() if isinstance(value, dict) else ((name, value),):
            if key in flat:
                twice.append(f"{path}: {printable(key)} is given twice: give it once.")
            flat[key] = entry
    if twice:
        raise ConfigError(*twice)
    return flat


def as_toml(config: TrainConfig) -> str:
    """The options of a run as TOML, by section; those without value as comments."""
    lines: list[str] = []
    for section, names in sections(TrainConfig).items():
        kept = [name for name in names if name not in RUN_ONLY]
        lines += ["", f"[{section.replace(' ', '_')}]"] if kept else []
        for name in kept:
            value = getattr(config, name)
            # JSON's text, numbers and lists are TOML's too.
            written = json.dumps(value, ensure_ascii=False)
            lines.append(f"# {name} =" if value is None else f"{name} = {written}")
    return "\n".join(lines[1:]) + "\n"


def _write(config: TrainConfig, place: str) -> list[str]:
    """Writes the options where they are wanted; returns what went wrong."""
    text = as_toml(config)
    if place == "-":
        print(text, end="")
        return []
    try:
        with Path(place).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return [f"--output_config: {place} exists already: name another file, or take it away."]
    except OSError as error:
        return [
            f"--output_config: {place} cannot be written ({error.strerror}): name another file."
        ]
    return []


def _parser(extent: str) -> argparse.ArgumentParser:
    """The parser that lays out the help: the usual options ("short"), or all of them."""
    short = extent == "short"
    count = len(TrainConfig.model_fields)
    parser = argparse.ArgumentParser(
        prog="train_dmp.py",
        usage="%(prog)s --base NAME --train_data_dir FOLDER [options]",
        description="Trains a DMP patch for a frozen diffusion model. docs/TRAINING.md is the "
        "guide, and docs/example-config.toml a configuration with comments."
        + (f" These are the options that most people need; --help all shows all {count}." * short),
        epilog="Examples: train_dmp.py --base digits | train_dmp.py --base sd15 --train_data_dir "
        "images --dry_run | accelerate launch train_dmp.py --config_file run.toml",
        add_help=False,
    )
    parser.add_argument("--help", metavar="all", help="Show this help, or all options.")
    add_options(parser, TrainConfig, TrainConfig.model_fields, short, RECIPES["paper"])
    return parser


__all__ = [
    "ConfigError",
    "Resolved",
    "as_toml",
    "parse_arguments",
    "read_options",
    "read_toml",
    "resolve",
    "with_base",
]
