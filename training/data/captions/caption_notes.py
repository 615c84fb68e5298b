"""What a user should know about the captions: counts, and what in them has no meaning here."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from training.data.samples import Sample
from training.data.summary import CaptionCounts

# At least one token each, for the tokenizers of CLIP and T5 alike.
_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]+|_+")
_WEIGHT = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet|ti):[^<>]*>", re.IGNORECASE)
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")


def caption_counts(
    samples: Sequence[Sample], empty: Collection[str], window: int | None
) -> CaptionCounts:
    """Counts of the captions of images.

    Args:
        samples: the images.
        empty: keys of images whose caption has no text.
        window: tokens that the text encoders read; None where it is not known.
    """
    bare = [sample for sample in samples if not any(sample.captions)]
    blank = sum(sample.key in empty or sample.origin in empty for sample in bare)
    cut = 0
    if window is not None:
        cut = sum(any(_is_long(text, window) for text in s.captions) for s in samples)
    return CaptionCounts(len(samples) - len(bare), len(bare) - blank, blank, cut)


def caption_notes(samples: Sequence[Sample]) -> list[str]:
    """A sentence for each kind of text that other programs understand and captions do not."""
    weights = networks = choices = 0
    for sample in samples:
        text = "\n".join(sample.captions)
        weights += bool(_WEIGHT.search(text))
        networks += bool(_NETWORK.search(text))
        if not sample.subset.captions.enable_wildcard:
            choices += bool(_CHOICE.search(text))
    notes = []
    if weights:
        notes.append(
            f"{weights:,} captions have weights such as (word:1.3), which are trained as plain text"
        )
    if networks:
        notes.append(f"{networks:,} captions have <lora:...>, which is trained as plain text")
    if choices:
        notes.append(
            f"{choices:,} captions have choices such as {{a|b}}, trained as plain text; "
            "--enable_wildcard draws one"
        )
    return notes


def _is_long(text: str, window: int) -> bool:
    # A word has a letter at least, and a token at least.
    return len(text) > window and sum(1 for _ in _WORD.finditer(text)) > window
