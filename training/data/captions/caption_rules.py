"""What becomes of a caption in each epoch: drawn, shuffled, shortened or dropped.

Nothing here keeps state: a draw depends on the seed, the epoch and the sample (see `draws`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from training.data import draws

_CHOICE = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")


@dataclass(frozen=True)
class CaptionRules:
    """Kohya's caption options of a subset, under kohya's names.

    Args:
        class_tokens: caption of an image that has none.
    """

    class_tokens: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_separator: str = ","
    secondary_separator: str | None = None
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    shuffle_caption: bool = False
    caption_tag_dropout_rate: float = 0.0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    enable_wildcard: bool = False

    @property
    def varying(self) -> list[str]:
        """The options in use that make a new text each time: they exclude a text cache."""
        names = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")
        return [name for name in names if getattr(self, name)]


def is_dropped(rules: CaptionRules, seed: int, epoch: int, item: str) -> bool:
    """Whether an item goes without its caption or label in this epoch."""
    every = rules.caption_dropout_every_n_epochs
    # Kohya counts epochs from 0 here and drops the n-th, 2n-th ... but never the first.
    if every and epoch > 0 and epoch % every == 0:
        return True
    return draws.uniform(seed, epoch, item, "dropout") < rules.caption_dropout_rate


def chosen(captions: tuple[str, ...], rules: CaptionRules, *draw: object) -> str:
    """The caption of this time: one of several, or the class tokens, with prefix and suffix."""
    if not captions:
        text = rules.class_tokens or ""
    elif len(captions) == 1:
        text = captions[0]
    else:
        text = captions[draws.below(len(captions), *draw, "caption")]
    parts = (rules.caption_prefix, text, rules.caption_suffix)
    return " ".join(part for part in parts if part)


def possible(captions: tuple[str, ...], rules: CaptionRules) -> list[str]:
    """Every caption that `chosen` may give."""
    return [chosen((text,), rules) for text in captions] or [chosen((), rules)]


def caption_text(captions: tuple[str, ...], rules: CaptionRules, *draw: object) -> str:
    """The caption as it is encoded, dropout aside."""
    text = chosen(captions, rules, *draw)
    if rules.enable_wildcard:
        text = _wildcards(text, *draw)
    separator = rules.caption_separator
    if rules.shuffle_caption or rules.caption_tag_dropout_rate:
        text = _tags(text, rules, *draw)
    elif rules.keep_tokens_separator:
        pieces = text.split(rules.keep_tokens_separator)
        text = f"{separator} ".join(p.strip(f"{separator} ") for p in pieces if p.strip())
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, separator)
    return text


def _wildcards(text: str, *draw: object) -> str:
    """Draws one of {a|b|c}; {{ and }} stand for braces."""
    text = text.replace("{{", "\x01").replace("}}", "\x02")
    count = 0
    while match := _CHOICE.search(text):
        options = match[1].split("|")
        pick = options[draws.below(len(options), *draw, "wildcard", count)]
        text, count = text[: match.start()] + pick + text[match.end() :], count + 1
    return text.replace("\x01", "{").replace("\x02", "}")


def _tags(text: str, rules: CaptionRules, *draw: object) -> str:
    """Shuffles and thins out the tags between those that stay at the start and at the end."""
    fixed, loose, last = _parts(text, rules)
    if rules.shuffle_caption:
        loose = [loose[i] for i in draws.permutation(len(loose), *draw, "shuffle")]
    rate = rules.caption_tag_dropout_rate
    if rate:
        loose = [tag for n, tag in enumerate(loose) if draws.uniform(*draw, "tag", n, tag) >= rate]
    return f"{rules.caption_separator} ".join([*fixed, *loose, *last])


def _parts(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    def tags(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(rules.caption_separator) if tag.strip()]

    if rules.keep_tokens_separator and rules.keep_tokens_separator in text:
        first, rest = text.split(rules.keep_tokens_separator, 1)
        middle, _, last = rest.partition(rules.keep_tokens_separator)
        return tags(first), tags(middle), tags(last)
    every = tags(text)
    return every[: rules.keep_tokens], every[rules.keep_tokens :], []
