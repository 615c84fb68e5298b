"""Attaches a patch to a model, and removes it again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MethodType, TracebackType
from typing import Any

from torch import Tensor

from dmp_common.attach.compatibility import (
    prediction_of_scheduler,
    require_compatible,
    require_timesteps_of_scheduler,
    zero_terminal_snr_of_scheduler,
)
from dmp_common.attach.experts import denoisers_of, expert_for
from dmp_common.attach.guided import Conditional, halves_of, sign_of
from dmp_common.attach.hooks import CallHooks
from dmp_common.attach.runtime import runtime_of
from dmp_common.attach.settings import Settings
from dmp_common.bases.detect import find_denoiser, require_known_pipeline
from dmp_common.bases.schedule import ALWAYS, Schedule
from dmp_common.errors import PatchError
from dmp_common.patch.noise import unlike_noise
from dmp_common.patch.patch import Patch

ScheduleLike = Schedule | Sequence[tuple[float, float]] | None
SitesLike = Iterable[str] | Mapping[str, float] | None


def attach(
    model: Any,
    patch: Patch,
    settings: Settings | None = None,
    *,
    strength: float = 1.0,
    schedule: ScheduleLike = None,
    temperature: float = 1.0,
    sites: SitesLike = None,
    prediction: str | None = None,
) -> Attachment:
    """Attaches a patch to a model, until `remove()` or the end of the `with` block.

    Several patches may be attached; their fields are added up. Attach before `torch.compile` of the
    whole model; `compile_repeated_blocks` may be called before or after. The weights of the model
    are not changed: after `remove()` it is what it was.

    Args:
        model: a diffusers pipeline, its unet or transformer, or an LDM model of a host. Of a
            pipeline with two experts the patch goes on the one that it was made for.
        patch: made for the base of this model.
        settings: strength, schedule, temperature and sites as one object. If it is given, these
            four arguments must be left out.
        strength: multiplies the added field; 0 is exactly the base.
        schedule: where along the timesteps the patch acts; or points (progress, factor), with
            progress 0 at the noise and 1 at the picture, and straight lines between them.
        temperature: divides the gate's logits.
        sites: names of the sites that act, None for all; or a mapping from names to factors of
            `strength`, where sites that are not named have factor 1.
        prediction: what the model predicts, if the caller knows it; None takes it from the
            pipeline's scheduler, if there is one.

    Warns:
        UserWarning: the pipeline's noise schedule has zero terminal SNR and that of the patch's
            training had not, or the other way round.

    Raises:
        PatchError: the patch is for another base, another time embedding or another prediction
            type than the model's, or the model is compiled already.

    Example:
        >>> pipe = diffusers.StableDiffusionPipeline.from_pretrained(...)  # doctest: +SKIP
        >>> with attach(pipe, Patch.load("p.safetensors"), strength=0.8):  # doctest: +SKIP
        ...     image = pipe("a photo of a cat").images[0]
    """
    said = (strength, schedule, temperature, sites) != (1.0, None, 1.0, None)
    if settings is not None and said:
        raise PatchError(
            "expected either settings or strength, schedule, temperature and sites, found both: "
            "give one of them."
        )
    if settings is None:
        named = sites if isinstance(sites, Mapping) else {}
        chosen = None if sites is None or isinstance(sites, Mapping) else frozenset(sites)
        settings = Settings(
            strength, as_schedule(schedule), temperature, chosen, tuple(named.items())
        )
    settings.require_sites(tuple(patch.sites))
    require_known_pipeline(*(kind.__name__ for kind in type(model).__mro__))
    denoiser = find_denoiser(expert_for(model, patch.variant))
    scheduler = getattr(model, "scheduler", None)
    prediction = prediction or prediction_of_scheduler(scheduler)
    naming = require_compatible(denoiser, patch.variant, prediction=prediction)
    require_timesteps_of_scheduler(scheduler, patch.variant, settings)
    other = unlike_noise(patch.metadata, zero_terminal_snr_of_scheduler(scheduler))
    if other is not None:
        warnings.warn(f"DMP: {other}.", stacklevel=2)
    hooks = CallHooks(denoiser, runtime_of(patch), naming, settings)
    hooks.conditional = halves_of(model, patch.base)
    if patch.variant.guidance is not None:
        hooks.sign = sign_of(model, patch.base)
    return Attachment(hooks, scheduler)


def as_schedule(schedule: ScheduleLike) -> Schedule:
    """Converts (progress, factor) points, or None (always), to a schedule; keeps a schedule."""
    if schedule is None:
        return ALWAYS
    return schedule if isinstance(schedule, Schedule) else Schedule.from_percent(curve=schedule)


def attached(model: Any) -> list[Attachment]:
    """Lists the attachments of a model, in the order in which they were made.

    Args:
        model: as for `attach`.
    """
    found = [hook for each in denoisers_of(model) for hook in each._forward_pre_hooks.values()]
    owners = [hook.__self__ for hook in found if isinstance(hook, MethodType)]
    return [Attachment(owner) for owner in owners if isinstance(owner, CallHooks)]


def detach(model: Any) -> int:
    """Removes every patch from a model, also those whose attachment is lost.

    Args:
        model: as for `attach`.

    Returns:
        The number of patches that were removed.
    """
    found = attached(model)
    for attachment in found:
        attachment.remove()
    return len(found)


class Attachment:
    """A patch on a model, as `attach` returns it. It is a context manager.

    `strength`, `schedule`, `settings` and `enabled` may be set at any time; the next forward call
    of the model uses them. The state of a call belongs to the thread that makes the call, and ends
    with the call. A deep copy of the model is patched like the original, independently of it:
    `attached(copy)` returns its attachment.

    Args:
        hooks: the hooks on the model.
        scheduler: the pipeline's scheduler, if there is one; new settings are checked against it.
    """

    def __init__(self, hooks: CallHooks, scheduler: Any = None) -> None:
        self._hooks = hooks
        self._scheduler = scheduler

    @property
    def patch(self) -> Patch:
        """The attached patch."""
        return self._hooks.runtime.patch

    @property
    def calls(self) -> int:
        """The number of forward calls in which the model embedded its timestep.

        Calls in compiled code are not counted one by one: all together they are one.
        Hosts warn if it is 0, because an engine that replaces the model (TensorRT) calls the
        denoiser but none of its parts.
        """
        return self._hooks.calls + self._hooks.compiled

    @property
    def active(self) -> bool:
        """Whether the patch is still on the model; `remove()` ends it."""
        return self._hooks.active

    @property
    def settings(self) -> Settings:
        """The settings, which say how the patch is used; may be set."""
        return self._hooks.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        settings.require_sites(tuple(self.patch.sites))
        require_timesteps_of_scheduler(self._scheduler, self.patch.variant, settings)
        self._hooks.use(settings, self._hooks.enabled)

    @property
    def strength(self) -> float:
        """The factor of the added field; may be set."""
        return self.settings.strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self.settings = replace(self.settings, strength=strength)

    @property
    def schedule(self) -> Schedule:
        """Where along the timesteps the patch acts; may be set, also to points, see `attach`."""
        return self.settings.schedule

    @schedule.setter
    def schedule(self, schedule: ScheduleLike) -> None:
        self.settings = replace(self.settings, schedule=as_schedule(schedule))

    @property
    def item_strengths(self) -> Tensor | None:
        """Factors of the strength of each batch item (B,); may be set, None where all are 1.

        They are used in all calls until they are set again, so each call must have B items.
        """
        return self._hooks.item_strengths

    @item_strengths.setter
    def item_strengths(self, factors: Tensor | None) -> None:
        self._hooks.item_strengths = factors

    @property
    def conditional(self) -> Conditional | None:
        """Tells from the number of items B which are conditional (B,), for guidance patches.

        It may be set. `attach` sets it for a pipeline of diffusers that guides within one call;
        where it is None, or returns None, class labels tell, and without them all items count as
        conditional. Of a pipeline that makes two calls for a step the second is the unconditional
        one, and of one that does not say whether it guides the first half of latents that are
        there twice, except in compiled code, which cannot tell.
        """
        return self._hooks.conditional

    @conditional.setter
    def conditional(self, conditional: Conditional | None) -> None:
        self._hooks.conditional = conditional

    @property
    def enabled(self) -> bool:
        """Whether the patch acts; may be set. When it does not, the model is exactly the base."""
        return self._hooks.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._hooks.use(self.settings, bool(enabled))

    def remove(self) -> None:
        """Takes the patch off the model. Calling it again does nothing."""
        self._hooks.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.enabled else "disabled"
        name = f"a patch for {self.patch.base.name}, strength {self.strength:g}"
        return f"<Attachment of {name}, {state if self.active else 'removed'}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attachment) and other._hooks is self._hooks

    def __hash__(self) -> int:
        return id(self._hooks)
