"""The parts of a base: sites, the source of the time embedding, probes, and one call of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor

from dmp_common.bases.schedule import LAST
from dmp_common.errors import PatchError

Naming = Literal["diffusers", "ldm"]
NAMINGS: tuple[Naming, ...] = ("diffusers", "ldm")
Place = Literal["input", "output"]
# How a tensor holds tokens, besides (B, L, D): (L, B, D), or (B, T, H, W, D).
Form = Literal["sequence first", "grid"]


@dataclass(frozen=True)
class Argument:
    """Says which argument of a module's forward call carries a value.

    Some hosts call blocks and models by position, others by keyword.

    Args:
        name: its keyword.
        index: its position, `self` not counted.
        needed: whether a call that has it cannot do without it.
    """

    name: str
    index: int
    needed: bool = False


V = TypeVar("V")


class ByNaming(dict[Naming, V]):
    """Holds facts for each naming. Asking for a naming without one raises a `PatchError`.

    Args:
        facts: the fact for each naming.
        what: what the facts are and of what, for the error message.
    """

    def __init__(self, facts: Mapping[Naming, V], what: str) -> None:
        super().__init__(facts)
        self.what = what

    def __missing__(self, naming: Naming) -> V:
        raise PatchError(
            f"expected {self.what} in the naming {naming!r}, found it in "
            f"{', '.join(map(repr, self)) or 'no naming'} only: use a model in one of these "
            "namings, or add this naming to the base."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.what)


class Late(Generic[V]):
    """Takes a dataclass's field as a function too, which is called when the field is first read.

    Some bases have hundreds of output sites, and most programs read those of one base only.

    Args:
        default: returns the value where none is given.
    """

    def __init__(self, default: Callable[[], V]) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[[], V]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> V: ...

    def __get__(self, instance: object | None, owner: type) -> V | Callable[[], V]:
        if instance is None:  # the dataclass asks for the field's default
            return self._default
        value = instance.__dict__[self._name]
        if callable(value):
            value = instance.__dict__[self._name] = value()
        return value  # type: ignore[no-any-return]

    def __set__(self, instance: object, value: V | Callable[[], V]) -> None:
        instance.__dict__[self._name] = value


@dataclass(frozen=True)
class ModelCall:
    """Holds the arguments of one forward call of a denoiser.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, argument: Argument | None) -> Any:
        """Returns the value of an argument, or None where the call does not have it."""
        if argument is None:
            return None
        if len(self.args) > argument.index:
            return self.args[argument.index]
        return self.kwargs.get(argument.name)

    def without(
        self, arguments: Sequence[Argument], acting: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword arguments with None in place of these, see `Base.kept`.

        Args:
            arguments: some of the call's.
            acting: whether a patch acts in the call.

        Raises:
            PatchError: one does, and the call cannot do without one of them.
        """
        needed = [argument for argument in arguments if argument.needed]
        if needed:
            found = [argument.name for argument in needed if self.get(argument) is not None]
            if found and acting:
                raise PatchError(
                    "expected calls that keep no keys and values of reference pictures, because a "
                    f"modulating patch changes them at every step, found {found[0]}: use the usual "
                    "pipeline (Flux2KleinPipeline in the place of Flux2KleinKVPipeline), or a "
                    "patch that adds its prompts."
                )
            return self.args, dict(self.kwargs)
        indices = {argument.index for argument in arguments}
        names = {argument.name for argument in arguments}
        return (
            tuple(None if n in indices else value for n, value in enumerate(self.args)),
            {name: None if name in names else value for name, value in self.kwargs.items()},
        )


@dataclass(frozen=True)
class Latent:
    """Describes the latents of one forward call.

    Args:
        batch: number of items B.
        size: height and width.
        image_tokens: number of image tokens in the model's sequence, where there are more than
            the latent's own (reference pictures, padding). None elsewhere.
        text_tokens: number of text tokens before the image tokens, one number for all items or
            one for each item. None where the image tokens come last.
        frames: number of frames of a video. Their image tokens follow one another in the sequence,
            without others around them, and the patch acts on each frame as on a picture.
    """

    batch: int
    size: tuple[int, int]
    image_tokens: int | None = None
    text_tokens: int | tuple[int, ...] | None = None
    frames: int = 1

    def rows(self, values: Tensor) -> Tensor:
        """Returns values (R, ...) without those that a token has beside the rest of its frame.

        Args:
            values: for each item, for each frame, or for each token of all items (R rows).

        Returns:
            One row for each item or frame. A frame has the value of its first token: those of a
            frame are equal wherever a model has one timestep for each token.
        """
        count = self.batch * self.frames
        return values if len(values) <= count else values[:: len(values) // count]


@dataclass(frozen=True)
class Site:
    """Describes a place of a model where a patch acts: a block's input or a module's output.

    Args:
        name: permanent, host-neutral name; the key of the tensor in a patch file.
        width: channels D: of the block's own input stream (without a skip connection), or of the
            site's part of the module's output.
        stride: latent pixels per grid cell of this site, in each direction; 1 for outputs.
        paths: module whose input or output is the site, for each naming.
        arguments: the argument of that module which carries the stream, for each naming. Outputs
            have none.
        place: whether the site is the module's input or its output.
        starts: the first of the site's channels in the module's output, for each naming where it
            is not 0: a fused layer computes several sites at once.
        axis: the channel axis of the output, -1 for linear layers and 1 for convolutions.
        forms: how the stream or the output holds its tokens, for each naming where it is not
            (B, L, D).
    """

    name: str
    width: int
    stride: int
    paths: Mapping[Naming, str]
    arguments: Mapping[Naming, Argument]
    place: Place = "input"
    starts: Mapping[Naming, int] = field(default_factory=dict)
    axis: int = -1
    forms: Mapping[Naming, Form] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, what in (("paths", "a module"), ("arguments", "an argument")):
            facts = ByNaming(getattr(self, name), f"{what} of site {self.name}")
            object.__setattr__(self, name, facts)


@dataclass(frozen=True)
class TimeSource:
    """Says where the pure time embedding e (T, E) of a model comes from.

    Args:
        path: the module whose output is e, before class, text, guidance or size embeddings.
        argument: the argument of the model's forward that carries the timestep.
        mlp: the module that maps the sinusoid of a timestep to e.
        projection: the module that has the sinusoid's `downscale_freq_shift`, or None where the
            shift is the base's own.
        scale: the timestep on the scale 0..1000 is the argument times this factor.
        inverted: whether the argument rises from noise to picture, so that it is 1000 - timestep.
        inside: whether the model computes e inside a block only, after the block's input is needed
            (diffusers' DiT). We then compute it before the first site with the module at `path`,
            which takes (timestep, labels).
        labels: the module that embeds class labels, where the base has them; its `embedding_table`
            is the table.
        row: which vector is e where the module at `path` gives several for each timestep (B, n, E);
            None where it gives e itself (B, E).
        own_sinusoid: the module at `mlp` makes the sinusoid itself: it is called with the model's
            argument and the type of its own weights.
    """

    path: str
    argument: Argument
    mlp: str
    projection: str | None = None
    scale: float = 1.0
    inverted: bool = False
    inside: bool = False
    labels: str | None = None
    row: int | None = None
    own_sinusoid: bool = False

    def embedding(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Returns e (B, E) of an output of the module at `path`; of several the last has it."""
        output = output[-1] if isinstance(output, tuple) else output
        return output if self.row is None or output.dim() == 2 else output[:, self.row]

    def timesteps(self, argument: Tensor) -> Tensor:
        """Returns timesteps, 1000 (noise) to 0 (picture), for the model's argument of any shape."""
        scaled = argument * self.scale
        # Near 1 a float32 resolves a timestep to 6e-5 only. Rounded timesteps can equal the ends of
        # a schedule.
        return torch.round(LAST - scaled, decimals=3) if self.inverted else scaled

    def values(self, timesteps: Tensor) -> Tensor:
        """Returns the model's argument for timesteps of any shape: the inverse of `timesteps`."""
        return (LAST - timesteps if self.inverted else timesteps) / self.scale


@dataclass(frozen=True)
class Probe:
    """States a fact that identifies a model: `attribute` of the module at `path` has `value`.

    Without an attribute (None) the module must be there (`value` True) or must not be there
    (`value` False).
    """

    path: str
    attribute: str | None
    value: object
