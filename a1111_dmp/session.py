"""The patches of one generation: attached while it samples, and only to the model it began with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.nn as nn

from dmp_common import Attachment, Base, PatchError, attach
from dmp_common.attach.record import PatchRecord
from dmp_common.bases.detect import require_base

NAME = "DMP"  # begins every message, which the host shows among those of others


@dataclass(frozen=True)
class Model:
    """The host's model at a moment.

    Args:
        denoiser: its UNet or transformer.
        checkpoint: what tells its weights from others: the file.
        prediction: what it predicts, None where the host does not say.
        to_timestep: the host's rule from progress to a timestep of a base.
        replaced: the name of what calculates in place of the denoiser (TensorRT), if anything.
    """

    denoiser: nn.Module
    checkpoint: str
    prediction: str | None
    to_timestep: Callable[[Base, float], float]
    replaced: str | None = None


class Session:
    """What one generation attaches, by where it was chosen: accordion, script and prompt.

    A context manager around the sampling. Hosts swallow errors in most of the places that call us,
    so an error is kept, and fails the sampling.

    Args:
        model: the host's model now.
        stopped: whether the user has interrupted or skipped.
        tell: shows a message on the console and beneath the picture.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        stopped: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self.running = False
        self.unused = ""  # why nothing was attached in the last sampling, if so
        self._model, self._stopped, self._tell = model, stopped, tell
        self._sources: dict[str, tuple[PatchRecord, ...]] = {}
        self._errors: dict[str, PatchError] = {}
        self._attachments: list[Attachment] = []
        self._made: list[Attachment] = []
        self._seat: tuple[object, ...] | None = None
        self._own = ""
        self._told: set[str] = set()

    def choose(self, source: str, records: Sequence[PatchRecord]) -> None:
        """Sets the patches from one place; the others' stay. Takes effect at once."""
        self._errors.pop(source, None)
        self._sources[source] = tuple(records)
        if self.running:
            self.follow()

    def fail(self, source: str, error: PatchError) -> None:
        """Makes the sampling fail with this error, unless `choose` comes before it."""
        self._errors[source] = error

    @property
    def records(self) -> list[PatchRecord]:
        """All patches, in the order in which they are attached."""
        return [record for source in sorted(self._sources) for record in self._sources[source]]

    def follow(self) -> None:
        """Attaches to the model there is now, and to none that the sampling did not begin with.

        Hosts load another checkpoint in the midst of a sampling (refiner, hires fix), some into the
        same modules and some into others, and come back to the first.

        Raises:
            PatchError: the patches do not fit the model; the sampling will fail too.
        """
        model, records = self._model(), self.records
        own = model.checkpoint == self._own and model.replaced is None
        seat = (weakref.ref(model.denoiser), *records) if own else ()
        if seat == self._seat:
            return
        self._detach()
        self._seat = seat
        if not records:
            return
        if not own:
            self._say_why_not(model)
            return
        try:
            for record in records:
                self._attachments.append(attached(model, record))
        except PatchError as error:
            self._errors[""] = error
            raise PatchError(f"{NAME}: {error}") from error
        finally:
            self._made += self._attachments

    def __enter__(self) -> Session:
        self._raise(self._errors)
        self._told.clear()
        self._made.clear()
        self.unused = ""
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
        errors = dict(self._errors)
        self.close()
        if error is not None:
            return
        self._raise(errors)
        if made and not calls and not self._stopped():
            self._not_applied("the model was never called; another extension replaces it")

    def close(self) -> None:
        """Takes everything off the model."""
        self._detach()
        self._made.clear()
        self._seat, self.running = None, False
        self._errors.pop("", None)

    @staticmethod
    def _raise(errors: Mapping[str, PatchError]) -> None:
        for error in errors.values():
            raise PatchError(f"{NAME}: {error}") from error

    def _detach(self) -> None:
        for attachment in self._attachments:
            attachment.remove()
        self._attachments.clear()

    def _say_why_not(self, model: Model) -> None:
        if model.replaced is not None:
            self._not_applied(
                f"expected the model's own UNet, found it replaced by {model.replaced}; set SD "
                "Unet to None in the settings"
            )
        elif model.checkpoint not in self._told:
            self._told.add(model.checkpoint)
            self._tell(
                f"{NAME}: the model is {Path(model.checkpoint).name} now; the patches are for "
                f"{Path(self._own).name} and do not act on it."
            )

    def _not_applied(self, why: str) -> None:
        names = ", ".join(record.loaded.name for record in self.records)
        self.unused = f"nothing was applied of {names}: {why}."
        self._tell(f"{NAME}: {self.unused}")


def attached(model: Model, record: PatchRecord) -> Attachment:
    """Attaches a patch to a host's model.

    Raises:
        PatchError: the model is of another base or predicts something else.
    """
    loaded = record.loaded
    patch, name = loaded.patch, loaded.name
    expected = patch.variant.prediction
    try:
        require_base(model.denoiser, patch.base)  # before what follows from it
        if model.prediction not in (None, expected):
            raise PatchError(
                f"expected a model with prediction type {expected}, found {model.prediction} in "
                f"{Path(model.checkpoint).name}: load the model the patch was trained for, or a "
                "patch for this one."
            )
        settings = record.settings(lambda percent: model.to_timestep(patch.base, percent))
        return attach(
            model.denoiser,
            patch,
            strength=settings.strength,
            schedule=settings.schedule,
            temperature=settings.temperature,
            sites=settings.sites,
        )
    except PatchError as error:
        raise PatchError(f"{name}: {error}") from error
