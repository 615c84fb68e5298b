"""Patches as extra networks: a tab with cards, and the prompt syntax `<dmp:name:0.8>`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modules import extra_networks, script_callbacks, shared, ui_extra_networks
from modules.ui_extra_networks import quote_js

from a1111_dmp import host, listing, tags
from a1111_dmp.choice import from_prompt
from a1111_dmp.infotext import hashes_text, read_hashes
from a1111_dmp.session import PROMPT
from dmp_common import PatchError
from dmp_common.attach.record import PatchRecord
from dmp_common.errors import printable, unmarked

_NAME = tags.NAME
_log = logging.getLogger(__name__)
_HASHES = "DMP hashes"


class Network(extra_networks.ExtraNetwork):  # type: ignore[misc]
    """Handles `<dmp:name:0.8>` in prompts.

    The host calls it for every batch, and again for the second pass of hires fix.
    """

    def __init__(self) -> None:
        super().__init__(_NAME)

    def activate(self, p: Any, params_list: list[Any]) -> None:
        """Chooses the patches of the prompts that are sampled next."""
        p.extra_generation_params.pop(_HASHES, None)
        pictures, both_passes = tags.of_batch(p, params_list)
        if not any(both_passes) and not hasattr(p, "dmp_session"):
            return
        session = host.session_of(p)
        session.fail(PROMPT, PatchError("the prompt could not be read; the console says why."))
        hashes: dict[str, str] = {}
        try:
            # An error in the second pass's prompt is reported at once.
            loaded = [self._records(picture, hashes) for picture in both_passes]
        except PatchError as error:
            session.fail(PROMPT, error)
            return
        if hashes:
            p.extra_generation_params[_HASHES] = hashes_text(hashes)
        session.choose(PROMPT, *loaded[: len(pictures)])

    def deactivate(self, p: Any) -> None:
        """Does nothing, because patches are on the model only while it samples."""

    def _records(self, params_list: list[Any], hashes: dict[str, str]) -> list[PatchRecord]:
        """Loads the patches of one prompt, and adds their hashes by name."""
        pairs = [self._choice(params).record(host.folder()) for params in params_list]
        hashes.update({known.name: known.hash for _, known in pairs})
        return [record for record, _ in pairs]

    @staticmethod
    def _choice(params: Any) -> Any:
        return from_prompt(params.items)


class Page(ui_extra_networks.ExtraNetworksPage):  # type: ignore[misc]
    """The tab with a card for each patch."""

    def __init__(self) -> None:
        super().__init__("DMP")

    def refresh(self) -> None:
        """Does nothing, because the folder is read whenever the cards are made."""

    def create_item(
        self, name: str, index: int | None = None, enable_filter: bool = True
    ) -> dict[str, Any] | None:
        """Returns what the host needs to make the card of a patch; None for no card."""
        item = self._item(name, host.folder().find(name), index)
        hidden = enable_filter and listing.hidden(item["metadata"].get("base"))
        return None if hidden else item

    def _item(self, name: str, path: Path, index: int | None) -> dict[str, Any]:
        """Returns what the host needs to make a card, whether it is shown or not."""
        stem = str(path.with_suffix(""))
        own = extra_networks.get_user_metadata(str(path)).get("preferred weight")
        try:
            record = host.folder().described(path)
            base, digest = record["base"], record["hash"]
            metadata = _metadata(record)
            described = _description(record, own, self.find_description(stem))
        except PatchError as error:
            base, digest, metadata = "", "", {"error": str(error)}
            described = unmarked(f"unusable: {error}")
        strength = f"{own:g}" if _is_strength(own) else "opts.extra_networks_default_multiplier"
        prompt = f"{quote_js(f'<{_NAME}:{name}:')} + {strength}"
        return {
            "name": name,
            "filename": str(path),
            "shorthash": digest,
            "preview": self.find_preview(stem),
            "description": described,
            "search_terms": [self.search_terms_from_path(str(path)), base, digest],
            "local_preview": f"{stem}.{shared.opts.samples_format}",
            "metadata": metadata,
            "sort_keys": {"default": index, **self.get_sort_keys(str(path))},
            "prompt": f"{prompt} + {quote_js('>')}",
        }

    def list_items(self) -> Iterator[dict[str, Any]]:
        """Yields all cards. The host makes all tabs at once, so an error here would empty them."""
        for index, (name, path) in enumerate(host.folder().files().items()):
            try:
                item = self._item(name, path, index)
            except OSError as error:  # the file went while the others were read
                _log.warning("DMP: no card of %s: %s", name, error)
                continue
            if not listing.hidden(item["metadata"].get("base")):
                yield item

    def allowed_directories_for_previews(self) -> list[str]:
        return [str(host.folder().root)]


def _metadata(record: dict[str, Any]) -> dict[str, str]:
    """Returns what the (i) of a card shows: facts of the file, and then what its maker wrote."""
    told = {name: _lines(text, printable) for name, text in record["metadata"].items()}
    # The first parts of the names: a patch may have hundreds of sites, and these name them too.
    places = dict.fromkeys(".".join(site["name"].split(".")[:2]) for site in record["sites"])
    facts = {
        "base": record["base"],
        "hash": record["hash"],
        "size": f"{record['bytes'] / 1e6:,.2f} MB",
        "parameters": f"{record['parameters']['total']:,}",
        "sites": f"{len(record['sites'])} of {record['sites_of_base']}: {', '.join(places)}",
        **{name: str(record["variant"][name]) for name in record["not_default"] if name != "sites"},
        **dict(record["described_use"]),
    }
    return {printable(name): text for name, text in {**told, **facts}.items()}


def _lines(text: str, safe: Callable[[str], str]) -> str:
    """Makes a text safe for a page, line by line, so that its line ends stay."""
    return "\n".join(safe(line) for line in text.splitlines())


def _is_strength(own: object) -> bool:
    """Tells whether a user has set a strength of his own; the host's editors write 0 for none."""
    return isinstance(own, int | float) and math.isfinite(own) and own != 0


def _description(record: dict[str, Any], own: object, text: str | None) -> str:
    """Returns the text of a card: base, strength and purpose, and then what was written about it.

    Args:
        record: of the file.
        own: the strength that the user prefers, from the file beside the patch.
        text: the user's description, from the file beside the patch; else that of its maker.
    """
    strength = f"{own:g} (yours)" if _is_strength(own) else "1"
    lines = [f"base {record['base']}, strength {strength}"]
    lines += [f"{key}: {value}" for key, value in record["described_use"]]
    told = text or record["metadata"].get("modelspec.description", "")
    return _lines("\n".join([*lines, told]), unmarked)


def add() -> None:
    """Registers the tab and the prompt syntax."""
    ui_extra_networks.register_page(Page())
    extra_networks.register_extra_network(Network())


def pasted(infotext: str, texts: dict[str, Any]) -> None:
    """Corrects the names of patches in a pasted prompt, by hash, if their files were renamed."""
    hashes = read_hashes(str(texts.get(_HASHES, "")))
    hashes |= {Path(name).name: digest for name, digest in hashes.items()}

    def renamed(match: re.Match[str]) -> str:
        name = match.group(1)
        digest = hashes.get(name) or hashes.get(Path(name).name)
        return f"<{_NAME}:{host.folder().by_hash(name, digest)}{match.group(2)}"

    for field in ("Prompt", "Hires prompt"):
        if texts.get(field):
            texts[field] = re.sub(rf"<{_NAME}:([^:>]+)([:>])", renamed, texts[field])


def register() -> None:
    """Asks the host to call us before it makes its tabs and when an infotext is pasted."""
    script_callbacks.on_before_ui(add)
    script_callbacks.on_infotext_pasted(pasted)
