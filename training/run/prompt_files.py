"""The prompts of previews: kohya's .txt with options after --, .toml and .json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dmp_common import PatchError
from dmp_common.errors import file_error, printable
from training.options.config import TrainConfig
from training.options.problems import ConfigError
from training.options.run_options import PreviewSampler

if TYPE_CHECKING:
    from dmp_common import Base
    from training.base.families.family import Family
    from training.base.frozen import FrozenBase

_OPTION = re.compile(r"(?:^|\s)--([A-Za-z_]+)(?=\s|$)")
# Letters of a .txt line: the names in .toml and .json.
_LETTERS = {
    "n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "s": "sample_steps",
    "l": "scale", "g": "guidance_scale", "ss": "sample_sampler", "i": "image_path",
}  # fmt: skip
_KINDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "sample_sampler", "image_path"), str),
    **dict.fromkeys(("width", "height", "seed", "sample_steps"), int),
    **dict.fromkeys(("scale", "guidance_scale"), float),
}
_AT_LEAST_ONE = ("width", "height", "sample_steps")
_CLASSES = 8  # previews of a base with classes, where no file says which
_MAX_BYTES = 1024**2


@dataclass(frozen=True)
class Prompt:
    """A prompt with all that a preview needs to know.

    Args:
        text: caption, or class id.
        negative: what the guidance leads away from.
        width, height: in pixels.
        seed: of the noise.
        steps: denoising steps.
        scale: of classifier-free guidance; for Flux the guidance scale that the model receives.
        sampler: kohya's name of a sampler; None for that of --sample_sampler.
        image: file of the first frame; None for none.
    """

    text: str
    negative: str
    width: int
    height: int
    seed: int
    steps: int
    scale: float
    sampler: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Entry:
    """A prompt as its file has it.

    Args:
        where: the line or the number of the prompt, for messages.
        values: by the names of `_KINDS`, of the right kinds.
    """

    where: str
    values: Mapping[str, Any]


def read_prompts(config: TrainConfig, frozen: FrozenBase) -> list[Prompt]:
    """The prompts of --sample_prompts; without a file, the first classes of a base with classes.

    Raises:
        ConfigError: no file where captions are needed, or entries that are no prompts.
    """
    if config.sample_prompts is not None:
        entries = read_prompt_file(Path(config.sample_prompts))
        require_prompts(entries, frozen.base, frozen.family)
    else:
        require_prompt_file(frozen.kind.conditioning == "caption")
        count = min(_CLASSES, frozen.kind.num_classes or 4)
        entries = [Entry(f"class {label}", {"prompt": str(label)}) for label in range(count)]
    prompts, problems = [], []
    for number, entry in enumerate(entries):
        prompt = _prompt(entry.values, number, config, frozen)
        wrong = _misfit(prompt, frozen)
        problems += [f"--sample_prompts, {entry.where}: {wrong}"] if wrong else []
        prompts.append(_fitted(prompt, frozen.factor * 2))
    if problems:
        raise ConfigError(*problems)
    return prompts


def require_prompt_file(captioned: bool) -> None:
    """Refuses previews without prompts.

    Args:
        captioned: whether the base draws from captions.

    Raises:
        ConfigError: it does.
    """
    if captioned:
        raise ConfigError(
            "expected --sample_prompts, a text file with one prompt a line, for previews, found "
            "none: write one, or leave out the previews."
        )


def require_prompts(entries: Sequence[Entry], base: Base, family: Family) -> None:
    """Refuses prompts that a base does not take, as far as its family tells.

    Raises:
        ConfigError: a line for each of them.
    """
    wrong = [(entry, _unfit(entry.values, base, family)) for entry in entries]
    problems = [f"--sample_prompts, {entry.where}: {why}" for entry, why in wrong if why]
    if problems:
        raise ConfigError(*problems)


def _unfit(values: Mapping[str, Any], base: Base, family: Family) -> str | None:
    """Why no base of a family takes a prompt."""
    image = values.get("image_path")
    if (image is not None) != family.first_frame:
        wanted = "a picture for the first frame (--i FILE)" if family.first_frame else "no --i"
        return f"expected {wanted} with base {base.name}, found {image or 'none'}."
    if image is not None and not Path(image).expanduser().is_file():
        return f"expected a picture for --i, found nothing at {image}: check the path."
    scale = values.get("scale", values.get("guidance_scale", 1.0))
    try:
        family.require_scale(scale, base.name)
    except PatchError as error:
        return str(error)
    return None


def read_prompt_file(path: Path) -> list[Entry]:
    """The prompts of a file, as far as they can be understood without a base.

    Raises:
        ConfigError: all that is wrong with the file.
    """
    # Here, because the check of a command line shall not wait for torch where it can do without.
    from dmp_common.patch.serialize import parse_json, read_bounded
    from training.options.toml_files import parse_toml

    found: object
    try:
        data = read_bounded(path, _MAX_BYTES, "a file of prompts")
        match path.suffix.lower():
            case ".toml":
                found = _tables(parse_toml(data, path), path)
            case ".json":
                found = parse_json(data.decode("utf-8-sig"))
            case _:
                found = _lines(data.decode("utf-8-sig"))
    except PatchError as error:
        raise ConfigError(f"--sample_prompts: {error}") from error
    except ValueError as error:  # no UTF-8, or no JSON
        wrong = file_error(path, "prompts in UTF-8", error, "correct the file")
        raise ConfigError(f"--sample_prompts: {wrong}") from error
    if not isinstance(found, list) or not found:
        raise ConfigError(f"--sample_prompts: expected a prompt in {path}, found none: write one.")
    problems: list[str] = []
    entries = [_entry(number, item, problems) for number, item in enumerate(found, 1)]
    if problems:
        raise ConfigError(*problems)
    return entries


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines of a text file that are prompts, with their numbers."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _tables(content: Mapping[str, Any], path: Path) -> list[Any]:
    """The prompts of kohya's TOML: [prompt] has what [[prompt.subset]] have in common."""
    common = content.get("prompt")
    if not isinstance(common, dict):
        raise file_error(path, "a table [prompt]", "none", "write it, with [[prompt.subset]]")
    shared = {name: value for name, value in common.items() if name != "subset"}
    subsets = common.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise file_error(path, "tables [[prompt.subset]]", subsets, "correct the file")
    return [{**shared, **subset} for subset in subsets]


def _entry(number: int, item: object, problems: list[str]) -> Entry:
    """One prompt of a file; what is wrong with it joins the problems."""
    where = f"prompt {number}"
    if isinstance(item, tuple):
        where, item = f"line {item[0]}", item[1]
    values = _of_line(item) if isinstance(item, str) else item
    if not isinstance(values, dict):
        problems.append(
            f"--sample_prompts, {where}: expected a text or a table, found {printable(item)}: "
            "correct the file."
        )
        return Entry(where, {})
    checked: dict[str, Any] = {}
    for name, value in values.items():
        wrong = None
        if name not in _KINDS:
            wrong = f"expected one of {_names()}, found {printable(name)}: leave it out"
        else:
            try:
                checked[name] = _KINDS[name](value)
            except (TypeError, ValueError, OverflowError):
                wrong = f"expected a number for {name}, found {printable(value)}: correct it"
        if name in _AT_LEAST_ONE and checked.get(name, 1) < 1:
            wrong = f"expected {name} of at least 1, found {checked[name]}: correct it"
        if name == "sample_sampler" and value not in get_args(PreviewSampler):
            wrong = f"expected one of {', '.join(get_args(PreviewSampler))}, found {value}"
        problems += [f"--sample_prompts, {where}: {wrong}."] if wrong else []
    if not checked.get("prompt"):
        problems.append(f"--sample_prompts, {where}: expected a prompt, found none: write one.")
    return Entry(where, checked)


def _of_line(line: str) -> dict[str, Any]:
    text, *rest = _OPTION.split(line)
    letters = [name.lower() for name in rest[::2]]
    values = [value.strip() for value in rest[1::2]]
    names = [_LETTERS.get(letter, f"--{letter}") for letter in letters]
    return {"prompt": text.strip(), **dict(zip(names, values, strict=True))}


def _names() -> str:
    return ", ".join(f"--{letter} ({name})" for letter, name in _LETTERS.items())


def _prompt(
    values: Mapping[str, Any], number: int, config: TrainConfig, frozen: FrozenBase
) -> Prompt:
    kind = frozen.kind
    sides = str(config.resolution or kind.resolution).split(",")
    # kohya's --l is the scale of classifier-free guidance, --g what a distilled Flux receives.
    names = ("scale", "guidance_scale")
    if getattr(frozen.model.config, "guidance_embeds", False):
        names = names[::-1]
    scale = values.get(names[0], values.get(names[1], frozen.family.guidance))
    return Prompt(
        text=values["prompt"].strip(),
        negative=values.get("negative_prompt", "").strip(),
        width=values.get("width", int(sides[0])),
        height=values.get("height", int(sides[-1])),
        seed=values.get("seed", config.seed + number),
        steps=values.get("sample_steps", config.sample_steps),
        scale=scale,
        sampler=values.get("sample_sampler"),
        image=values.get("image_path"),
    )


def _misfit(prompt: Prompt, frozen: FrozenBase) -> str | None:
    """Why a base does not take a prompt."""
    kind = frozen.kind
    if kind.conditioning == "label":
        count = kind.num_classes or 0
        if not prompt.text.isdecimal():
            return f"expected a class id, found {printable(prompt.text)}: write a number."
        if int(prompt.text) >= count:
            return f"expected a class id below {count}, found class {prompt.text} of {count}."
    if kind.square and prompt.width != prompt.height:
        return (
            f"expected equal sides, found {prompt.width} x {prompt.height}; this base takes "
            "squares only."
        )
    return None


def _fitted(prompt: Prompt, step: int) -> Prompt:
    """The prompt with sides that are multiples of a step."""
    width, height = (max(step, side // step * step) for side in (prompt.width, prompt.height))
    return Prompt(**{**vars(prompt), "width": width, "height": height})
