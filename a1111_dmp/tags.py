"""The tags `<dmp:...>` of each picture of a batch.

The host passes on only those of the first picture, for all of them. So the prompts of the batch are
read here once more, as they were before the host took the tags out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from modules import extra_networks

NAME = "dmp"
Tags = list[Any]  # of one picture, in the host's form


def of_batch(p: Any, given: Tags) -> tuple[list[Tags], list[Tags]]:
    """Returns the tags of the pictures that are sampled next, and those of both passes.

    Args:
        p: the generation.
        given: the tags that the host passes on.

    Returns:
        One list for each picture, or one list for all of them; and all lists of both passes of
        hires fix, so that an error in the second one is found before the first.
    """
    first = _each(p, "prompts", "all_prompts", "extra_network_data")
    second = _each(p, "hr_prompts", "all_hr_prompts", "hr_extra_network_data")
    now = second if getattr(p, "is_hr_pass", False) else first
    if not now or now[0] != given:  # The host knows better: another extension changed something.
        now = [given]
    return now, [*now, *first, *second]


def remember(p: Any, prompts: Sequence[str]) -> None:
    """Keeps the host's list of the prompts of a batch, to which other extensions may write yet."""
    p.dmp_prompts = prompts


def _each(p: Any, stripped: str, whole: str, data: str) -> list[Tags]:
    """Returns the tags of each picture in one pass; those of the first where no more is known."""
    known: Tags = (getattr(p, data, None) or {}).get(NAME, [])
    texts = getattr(p, stripped, None) or []
    for prompts in _sources(p, whole):
        parsed = [extra_networks.parse_prompt(prompt) for prompt in prompts]
        if parsed and [text for text, _ in parsed] == list(texts):
            tags = [tags.get(NAME, []) for _, tags in parsed]
            if tags[0] == known:
                return tags
    return [known] if known else []


def _sources(p: Any, whole: str) -> Iterator[Sequence[str]]:
    """Yields the places where the prompts of a batch may be as they were written."""
    if whole == "all_prompts":
        yield getattr(p, "dmp_prompts", ())
    start, size = getattr(p, "iteration", 0), getattr(p, "batch_size", 1)
    yield (getattr(p, whole, None) or [])[start * size : (start + 1) * size]
