"""Our scripts in txt2img and img2img: an accordion, and an entry of the Script drop-down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modules import scripts
from modules.processing import process_images
from modules.ui_components import InputAccordion

from a1111_dmp import axes, cards, host, listing, options, tags
from a1111_dmp.choice import from_controls, is_on, omitted
from a1111_dmp.controls import Controls, Switch
from dmp_common import PatchError


class Accordion(scripts.Script):  # type: ignore[misc]
    """The accordion. It can be combined with every other script, such as the X/Y/Z plot."""

    def title(self) -> str:
        return "DMP"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        controls = Controls(self, "DMP")
        with InputAccordion(False, label="DMP", elem_id=self.elem_id("enabled")) as enabled:
            controls.build()
        self.infotext_fields = [(enabled, Switch("DMP")), *controls.fields]
        self.paste_field_names = [reading for _, reading in self.infotext_fields]
        return [enabled, *controls.all]

    def process(self, p: Any, enabled: Any, *values: Any) -> None:
        chosen = axes.of(p)
        if enabled is not False or chosen or hasattr(p, "dmp_session"):
            choose(p, "accordion", "DMP", values, enabled, chosen)
        else:
            host.set_infotext(p, "DMP", {})

    def before_process_batch(self, p: Any, *values: Any, prompts: Any = (), **rest: Any) -> None:
        """Keeps the prompts with their tags, which the host takes out of them next."""
        tags.remember(p, prompts)


class DropDown(scripts.Script):  # type: ignore[misc]
    """The entry of the Script drop-down. Its patches add to those of the accordion."""

    def title(self) -> str:
        return "DMP script"

    def show(self, is_img2img: bool) -> object:
        return True

    def ui(self, is_img2img: bool) -> list[Any]:
        controls = Controls(self, "DMP script", " (script)")
        controls.build()
        self.infotext_fields = controls.fields
        self.paste_field_names = [reading for _, reading in controls.fields]
        return controls.all

    def run(self, p: Any, *values: Any) -> Any:
        values = tuple(omitted(values, len(p.script_args), len(p.scripts.inputs)))
        choose(p, "script", "DMP script", values)
        p.extra_generation_params["Script"] = self.title()
        return process_images(p)


def choose(
    p: Any,
    source: str,
    prefix: str,
    values: Sequence[Any],
    enabled: Any = True,
    chosen: dict[tuple[int, str], Any] | None = None,
) -> None:
    """Chooses the patches of a generation from the values of some controls.

    The host swallows the errors of an always-visible script and goes on without it. So the session
    is first told to fail, and succeeds only if nothing here raised, expected or not.

    Args:
        p: the generation.
        source: the place where the patches are chosen, see `Session.choose`.
        prefix: begins the keys in the infotext.
        values: of the controls.
        enabled: the switch of the accordion.
        chosen: fields that an X/Y/Z plot has set, by slot and name.
    """
    session = host.session_of(p)
    session.fail(source, PatchError("the settings could not be read; the console says why."))
    host.set_infotext(p, prefix, {})
    try:
        on = is_on(enabled) or bool(chosen)
        records, texts = host.records(from_controls(values, chosen) if on else [], prefix)
    except PatchError as error:
        session.fail(source, error)
        return
    session.choose(source, records)
    host.set_infotext(p, prefix, texts)
    if on and not records and not chosen:
        host.tell(p, f"{prefix}: it is on and no patch is chosen, so it does nothing.")


def register() -> None:
    """Asks the host to call us. It must be asked again whenever the scripts are reloaded."""
    host.register()
    cards.register()
    axes.register()
    listing.register()
    options.register()
