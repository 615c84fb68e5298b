"""The patches of one generation.

They are attached while it samples, and only to the model with which it began.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from a1111_dmp.chosen import NAME, Chosen, of_pictures
from a1111_dmp.conditions import Conditions
from dmp_common import Attachment, Base, PatchError, attach
from dmp_common.attach.record import PatchRecord
from dmp_common.patch.noise import unlike_noise
from dmp_common.tools.use import cheap_types, unlike_cheap
from dmp_common.tools.weighttypes import weight_types

# The source whose patches go with the prompt to each model that it is used with.
PROMPT = "prompt"


@dataclass(frozen=True)
class Model:
    """The model that a host has loaded.

    Args:
        denoiser: its UNet or transformer.
        checkpoint: the file of its weights, by which it is recognised.
        prediction: its prediction type; None where the host does not say.
        to_timestep: converts progress to a timestep of a base, by the host's rule.
        zero_terminal_snr: whether its noise schedule ends in pure noise; None where that is not
            known, or cannot be.
        replaced: the name of the engine that computes in place of the denoiser (TensorRT); None
            without one.
    """

    denoiser: nn.Module
    checkpoint: str
    prediction: str | None
    to_timestep: Callable[[Base, float], float]
    replaced: str | None = None
    zero_terminal_snr: bool | None = None


class Session:
    """The patches of one generation, by the place where they were chosen.

    The places, called sources, are the accordion, the script and the prompt. A session is a context
    manager around the sampling. Hosts swallow errors in most places that call us, so an error is
    kept, and raised when the sampling begins or ends.

    Args:
        model: returns the model that the host has loaded now.
        stopped: tells whether the user has interrupted or skipped the generation.
        tell: shows a message on the console and below the picture.

    Attributes:
        running: whether the generation samples now.
        scale: the generation's guidance scale (CFG Scale).
        more_models: whether the generation loads other checkpoints too (refiner, hires fix).
        conditions: which items of the model's calls are conditional.
        unused: why the last sampling applied no patch; empty if it did.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        stopped: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self.running = False
        self.unused = ""
        self.scale = 1.0
        self.more_models = False
        self.conditions = Conditions()
        self._model, self._stopped, self._tell = model, stopped, tell
        self._sources: dict[str, tuple[Chosen, ...]] = {}
        self._errors: dict[str, PatchError] = {}
        self._attachments: list[tuple[Chosen, Attachment]] = []
        self._handle: RemovableHandle | None = None
        self._made: list[Attachment] = []
        self._seat: tuple[object, ...] | None = None
        self._own = ""
        self._told: set[str] = set()

    def choose(self, source: str, *pictures: Sequence[PatchRecord]) -> None:
        """Replaces the patches of one source. A sampling under way uses them at once.

        Args:
            source: the place where they were chosen.
            pictures: the patches of each picture of the batch, or one list for all pictures.
        """
        self._errors.pop(source, None)
        self._sources[source] = tuple(of_pictures(pictures, source == PROMPT))
        if self.running:
            self.follow()

    def fail(self, source: str, error: PatchError) -> None:
        """Makes the sampling fail with this error, unless `choose` is called before it begins."""
        self._errors[source] = error

    @property
    def records(self) -> list[PatchRecord]:
        """The patches of all sources, in the order in which they are attached."""
        return [chosen.record for chosen in self._all]

    @property
    def _all(self) -> list[Chosen]:
        return [chosen for source in sorted(self._sources) for chosen in self._sources[source]]

    @property
    def mixed(self) -> bool:
        """Whether the pictures of a batch have different patches."""
        return any(chosen.pictures is not None for chosen in self._all)

    def follow(self) -> None:
        """Attaches the patches to the loaded model: all to the one with which the sampling began.

        For the refiner and for hires fix, hosts load another checkpoint during the sampling and
        return to the first one later. Some load it into the same modules, some into others. There
        the patches of the prompt act alone, if they fit.

        Raises:
            PatchError: the patches do not fit the model. The error also fails the sampling, for
                hosts that swallow it here.
        """
        model = self._model()
        own = model.checkpoint == self._own
        acting = [c for c in self._all if model.replaced is None and (own or c.follows)]
        seat = (weakref.ref(model.denoiser), model.checkpoint, model.replaced, *acting)
        if seat == self._seat:
            return
        self._detach()
        self._seat = seat
        self._say_why_not(model)
        try:
            for chosen in acting:
                self._attach(model, chosen, own)
        except PatchError as error:
            self._errors[""] = error
            raise PatchError(f"{NAME}: {error}") from error
        if self._attachments:
            self._handle = model.denoiser.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._say_unfit(model, [chosen.record for chosen, _ in self._attachments])

    def _attach(self, model: Model, chosen: Chosen, own: bool) -> None:
        """Attaches a patch, or says why not if it may be for another model of the generation."""
        try:
            attachment = attached(model, chosen.record)
        except PatchError as error:
            if not chosen.follows or (own and not self.more_models):
                raise
            name = Path(model.checkpoint).name
            self._say(f"{error} It does not act on {name}, with which the prompt is used too.")
            return
        attachment.conditional = self.conditions
        self._attachments.append((chosen, attachment))
        self._made.append(attachment)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the attachments what the items of a call are; a forward pre-hook of the model."""
        self.conditions.begin(module, args, kwargs)
        for chosen, attachment in self._attachments:
            attachment.item_strengths = chosen.factors(self.conditions.pictures)

    def __enter__(self) -> Session:
        self._raise(self._errors)
        self._told.clear()
        self._made.clear()
        self.conditions, self.unused = Conditions(), ""
        try:
            self._own = self._model().checkpoint
        except PatchError as error:
            raise PatchError(f"{NAME}: {error}") from error
        self.running = True
        try:
            self.follow()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        made, calls = len(self._made), sum(attachment.calls for attachment in self._made)
        wanted = bool(self.records) and not self.unused
        errors = dict(self._errors)
        self.close()
        if error is not None:
            return
        self._raise(errors)
        if self._stopped():
            return
        if made and not calls:
            self._not_applied("the model was never called; another extension replaces it")
        elif wanted and not made:
            self._not_applied("no model of this generation fits; the messages above say why")

    def close(self) -> None:
        """Removes all patches from the model and ends the sampling."""
        self._detach()
        self._made.clear()
        self._seat, self.running = None, False
        self._errors.pop("", None)

    @staticmethod
    def _raise(errors: Mapping[str, PatchError]) -> None:
        for error in errors.values():
            raise PatchError(f"{NAME}: {error}") from error

    def _detach(self) -> None:
        for _, attachment in self._attachments:
            attachment.remove()
        self._attachments.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _say_unfit(self, model: Model, records: Sequence[PatchRecord]) -> None:
        """Says once where a patch is used with a model or a scale that it was not made for."""
        for record in records:
            patch, name = record.loaded.patch, record.loaded.name
            notes = [unlike_noise(patch.metadata, model.zero_terminal_snr)]
            if cheap_types(patch.metadata):
                notes.append(unlike_cheap(patch.metadata, weight_types(model.denoiser)))
            if patch.variant.guidance is not None and self.scale > 1.0:
                notes.append(
                    "the patch takes the place of the second call of guidance, and this generation "
                    "makes that call too: set CFG Scale to 1 (its strength is the guidance)"
                )
            for note in filter(None, notes):
                self._say(f"{name}: {note}.")

    def _say_why_not(self, model: Model) -> None:
        """Says which patches do not act on the loaded model, because none can or all stay."""
        if self.records and model.replaced is not None:
            self._not_applied(
                f"expected the model's own UNet, found it replaced by {model.replaced}; set SD "
                "Unet to None in the settings"
            )
        elif model.checkpoint != self._own and any(not c.follows for c in self._all):
            self._say(
                f"the model is {Path(model.checkpoint).name} now; the patches of the controls are "
                f"for {Path(self._own).name} and do not act on it."
            )

    def _say(self, text: str) -> None:
        """Shows a message once in a sampling."""
        if text not in self._told:
            self._told.add(text)
            self._tell(f"{NAME}: {text}")

    def _not_applied(self, why: str) -> None:
        names = ", ".join(record.loaded.name for record in self.records)
        self.unused = f"nothing was applied of {names}: {why}."
        self._tell(f"{NAME}: {self.unused}")


def attached(model: Model, record: PatchRecord) -> Attachment:
    """Attaches a patch to a host's model.

    Raises:
        PatchError: the model has another base or another prediction type than the patch. The
            message begins with the name of the patch.
    """
    loaded = record.loaded
    base = loaded.patch.base
    try:
        settings = record.settings(lambda percent: model.to_timestep(base, percent))
        return attach(model.denoiser, loaded.patch, settings, prediction=model.prediction)
    except PatchError as error:
        raise PatchError(f"{loaded.name}: {error}") from error
