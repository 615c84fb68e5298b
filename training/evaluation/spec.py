"""What the command line says of a row of the report: the model, and how it is sampled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic import Field as Limited

from dmp_common import PatchError
from training.evaluation.settings import as_epsilon
from training.options.model_options import Quantization
from training.options.sentences import sentence_of

TRAINED = ("dmp", "prompt", "lora", "full", "joint")
# What models are put on, as it is; and the full model, where that is a cheap form of it.
PLAIN = ("base", "exact")
BASE, FULL, CHEAP = "base", "full model", "cheap model as it is"  # labels of our own rows
_SETTINGS = re.compile(r"(?P<path>.*)@(?P<settings>\w+=[^@/\\]*)", re.DOTALL)


class RowSettings(BaseModel):
    """What a row has otherwise than the options of the evaluation; None where it has not.

    Args:
        steps, guidance, sampler, epsilon: as --sample_steps, --guidance_scale, --sampler and
            --epsilon_scale.
        strength: of a patch.
        quantization: of the base, as --student_quantization names it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Limited(None, ge=1)
    guidance: float | None = Limited(None, ge=0, allow_inf_nan=False)
    sampler: str | None = None
    epsilon: str | None = None
    strength: float | None = Limited(None, allow_inf_nan=False)
    quantization: Quantization | None = None

    @field_validator("epsilon")
    @classmethod
    def _is_a_scale(cls, value: str | None) -> str | None:
        if value is not None:
            as_epsilon(value)
        return value


@dataclass(frozen=True)
class How:
    """How the samples of a row are drawn.

    Args:
        steps, scale, sampler: see `draw_latents`.
        epsilon: the factor of `epsilon_scaled`; None where it is tuned.
    """

    steps: int
    scale: float
    sampler: str
    epsilon: float | None = 1.0


_KEYS = ", ".join(RowSettings.model_fields)
# The kinds that a setting is for, where it is not for all.
_FITTING = {"strength": ("dmp", "prompt"), "quantization": ("base",)}


_NOTHING = RowSettings.model_validate({})


@dataclass(frozen=True)
class Spec:
    """One --model LABEL=KIND:PATH or LABEL=KIND:PATH@NAME=VALUE,...

    Args:
        label: name in the report; the same label several times means several seeds.
        kind: one of `TRAINED` or `PLAIN`.
        path: of a file, or of a folder for full and joint; "" for `PLAIN`.
        settings: how it is sampled, where it differs.
    """

    label: str
    kind: str
    path: str
    settings: RowSettings = _NOTHING

    @property
    def trained(self) -> bool:
        """Whether it has a file."""
        return self.kind in TRAINED

    @property
    def sampled_alone(self) -> bool:
        """Whether its samples are drawn otherwise than those of most rows."""
        own = self.settings
        return any(v is not None for v in (own.steps, own.guidance, own.sampler, own.epsilon))

    @staticmethod
    def parse(text: str) -> Spec:
        """Reads a value of --model.

        Raises:
            PatchError: it is neither LABEL=KIND:PATH nor that with settings behind it.
        """
        label, equals, rest = text.partition("=")
        kind, colon, path = rest.partition(":")
        path, settings = _split(path, text)
        has_path = bool(path) == (kind in TRAINED)
        if not (label.strip() and equals and colon and has_path) or kind not in (*TRAINED, *PLAIN):
            raise PatchError(
                f"expected --model LABEL=KIND:PATH with KIND {', '.join(TRAINED)}, or LABEL=base:"
                f"@NAME=VALUE for a row without a file, found {text!r}: for example --model "
                'DMP=dmp:output/digits/digits-dmp.safetensors, or "half the steps=base:@steps=10".'
            )
        if label.strip() in (BASE, FULL, CHEAP):
            raise PatchError(
                f"expected another label than {BASE}, {FULL} and {CHEAP}, found {text!r}: rename "
                "it."
            )
        for name, kinds in _FITTING.items():
            if getattr(settings, name) is not None and kind not in kinds:
                raise PatchError(
                    f"expected {name} only for kind {' and '.join(kinds)}, found it for {kind} in "
                    f"--model {text!r}: leave it out."
                )
        return Spec(label.strip(), kind, path, settings)


def _split(path: str, text: str) -> tuple[str, RowSettings]:
    """The path, and the settings behind its @; a path that exists may hold an @ itself."""
    found = _SETTINGS.fullmatch(path)
    if found is None or Path(path).exists():
        return path, _NOTHING
    given: dict[str, str] = {}
    problems = []
    for part in found["settings"].split(","):
        name, _, value = part.partition("=")
        if name.strip() not in RowSettings.model_fields:
            problems.append(f"expected a setting out of {_KEYS}, found {part.strip()!r}")
        elif name.strip() in given:
            problems.append(f"expected {name.strip()} once, found it twice")
        else:
            given[name.strip()] = value.strip()
    try:
        settings = RowSettings.model_validate(given)
    except ValidationError as error:
        wrong = sorted({str(entry["loc"][0]) for entry in error.errors()})
        problems += [
            sentence_of(name, error).removeprefix("--").removesuffix(".") for name in wrong
        ]
    if problems:
        raise PatchError(f"--model {text!r}: {'; '.join(problems)}: correct the part behind @.")
    return found["path"], settings
