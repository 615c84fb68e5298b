"""Output sites: what a modulating patch scales and shifts, described layer by layer.

A `Layer` is one linear layer or convolution of a model, with its path in both namings. The original
code often computes several of diffusers' layers by one fused layer; then each has its own range of
the fused layer's channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from dmp_common.bases.parts import Form, Naming, Site

Kind = Literal["linear", "modulation", "convolution"]


class Layer(NamedTuple):
    """Describes one layer, or the part of a fused layer that is a layer of its own in diffusers.

    Args:
        name: the permanent name of its output site.
        width: channels of its output.
        diffusers, ldm: path of the module in each naming; None where there is no such naming.
        start: its first channel in the output of the module of the naming "ldm".
        kind: "linear" for attention and feed-forward, "modulation" for what computes scales,
            shifts and gates from the time embedding, "convolution" for convolutions.
        forms: see `Site`; None where all are (B, L, D).
    """

    name: str
    width: int
    diffusers: str
    ldm: str | None
    start: int = 0
    kind: Kind = "linear"
    forms: Mapping[Naming, Form] | None = None


def under(layers: Iterable[Layer], name: str, diffusers: str, ldm: str | None) -> Iterator[Layer]:
    """Yields layers with the name and the paths of the block that holds them put before theirs."""
    for layer in layers:
        yield layer._replace(
            name=f"{name}.{layer.name}",
            diffusers=f"{diffusers}.{layer.diffusers}",
            ldm=None if ldm is None else f"{ldm}.{layer.ldm}",
        )


def fused(ldm: str, parts: Iterable[tuple[str, int, str]]) -> Iterator[Layer]:
    """Yields the layers that one layer of the naming "ldm" computes together, in its order.

    Args:
        ldm: path of the fused layer.
        parts: name, width and path in diffusers of each layer.
    """
    start = 0
    for name, width, diffusers in parts:
        yield Layer(name, width, diffusers, ldm, start)
        start += width


def output_sites(layers: Callable[[], Iterable[Layer]]) -> tuple[Site, ...]:
    """Returns the output sites of layers, in their order."""
    return tuple(
        Site(
            layer.name,
            layer.width,
            1,
            paths=_paths(layer),
            arguments={},
            place="output",
            starts={"ldm": layer.start} if layer.start else {},
            axis=1 if layer.kind == "convolution" else -1,
            forms=layer.forms or {},
        )
        for layer in layers()
    )


def _paths(layer: Layer) -> dict[Naming, str]:
    found: dict[Naming, str] = {"diffusers": layer.diffusers}
    return found if layer.ldm is None else {**found, "ldm": layer.ldm}


def output_sets(layers: Callable[[], Iterable[Layer]]) -> dict[str, tuple[str, ...]]:
    """Returns the named choices of the output sites of layers.

    `linear` has the linear layers of attention and feed-forward, `modulation` the modulation
    layers, `modulated` both, and `outputs`, where a model has convolutions in its blocks, those as
    well. A modulation layer is called with the embedding of the timestep, so that its output is a
    vector and not one for each token: to change it costs next to nothing.
    """
    known = list(layers())
    kinds: dict[str, tuple[Kind, ...]] = {
        "linear": ("linear",),
        "modulation": ("modulation",),
        "modulated": ("linear", "modulation"),
        "outputs": ("linear", "modulation", "convolution"),
    }
    if all(layer.kind != "convolution" for layer in known):
        del kinds["outputs"]
    if all(layer.kind != "modulation" for layer in known):
        del kinds["modulation"]
    return {
        name: tuple(layer.name for layer in known if layer.kind in wanted)
        for name, wanted in kinds.items()
    }


def attention_layers(
    width: int, diffusers: Sequence[str], ldm: str, keys: int | None = None
) -> Iterator[Layer]:
    """Yields queries, keys and values that one layer of the naming "ldm" computes together.

    Args:
        width: channels of the queries.
        diffusers: paths of the three layers.
        ldm: path of the fused layer.
        keys: channels of the keys and of the values. None means `width`.
    """
    widths = (width, keys or width, keys or width)
    return fused(ldm, zip(("to_q", "to_k", "to_v"), widths, diffusers, strict=True))
