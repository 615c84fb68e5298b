"""Attaches a patch to a ComfyUI model, and lets it act in each call of the model.

ComfyUI calls our wrapper around `BaseModel.apply_model`. There the noise level is known, and no
compiled code has started yet. The wrapper fills the model's slots (`slots.py`) for that one call,
or puts hooks on the model for it (`hooks.py`) where there is no slot. It belongs to a clone of the
host's `ModelPatcher`. The model itself is shared by all clones, so it is never changed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn as nn
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from comfyui_dmp.checks import require_fitting, require_not_compiled, require_references
from comfyui_dmp.compiled import for_compiled, own_graph
from comfyui_dmp.hooks import adding, modulating
from comfyui_dmp.masks import MaskOfCalls
from comfyui_dmp.model import (
    denoiser_of,
    is_compiled,
    kept_references,
    latent_of,
    time_embedding,
    timesteps_of,
    timesteps_of_call,
)
from comfyui_dmp.notices import (
    OtherExpert,
    SecondCall,
    conditional_items,
    say_other_noise,
    say_unlike,
)
from comfyui_dmp.recompute import Inside, recomputing
from comfyui_dmp.slots import (
    Prepare,
    after_options,
    block_keys,
    dit_options,
    slot_of,
    unet_options,
)
from dmp_common import Context, Settings
from dmp_common.attach.masking import MaskedContext
from dmp_common.attach.modulation import parts_of
from dmp_common.attach.record import PatchRecord

KEY = "dmp"  # Names our wrappers on a model.


def attach(model: Any, record: PatchRecord) -> Any:
    """Returns a clone of a model with a patch on it.

    The fields of several patches add up; modulating ones act in the order of attaching.

    Args:
        model: ComfyUI's `ModelPatcher`, which is not changed.
        record: the patch and its settings.

    Raises:
        PatchError: the model is not supported, or it has another base or another prediction type
            than the patch, or the patch prepends its prompts.
    """
    wrapper = Wrapper(record)
    wrapper.check(model)
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    if wrapper.mask is not None:
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, wrapper.mask)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, wrapper.release)
    return clone


class Wrapper:
    """ComfyUI calls it around each call of a patched model. It keeps no state of a call.

    Attributes:
        item_strengths: factors of the strength of each item (B,), which training sets before its
            own calls; None where all are 1.
        recompute: whether the backward pass recomputes the model's blocks, which training sets.
    """

    item_strengths: Tensor | None = None
    recompute: bool = False

    def __init__(self, record: PatchRecord) -> None:
        self.record = record
        self.mask = None if record.mask is None else MaskOfCalls(record.mask)
        self._base = record.loaded.patch.base
        self._slot = slot_of(self._base, record.loaded.patch.modulates)
        off = {name for name, factor in record.site_strengths if factor == 0.0}
        self._sites = {
            name: site
            for name, site in record.loaded.patch.sites.items()
            if name not in off and (record.sites is None or name in record.sites)
        }
        self._parts = parts_of(self._sites.values(), "ldm") if self._slot == "outputs" else {}
        self._keys = {
            key: name for key, name in block_keys(self._base).items() if name in self._sites
        }
        self._second_call = SecondCall(record)
        self._other_expert = OtherExpert(record)
        self._known: tuple[Any, Settings] | None = None

    def check(self, model: Any) -> None:
        """Logs what of a model is not as in the patch's training.

        Args:
            model: ComfyUI's `ModelPatcher`.

        Raises:
            PatchError: as `attach`; the patch cannot act on the model.
        """
        model_sampling = model.get_model_object("model_sampling")
        self.settings(model.model, model_sampling)  # Fails if unfit.
        say_unlike(denoiser_of(model.model), self.record)
        say_other_noise(model_sampling, self.record)

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Any:
        """Calls the model with the patch.

        Args:
            executor: calls the next wrapper; the last one calls the model.
            x: noisy latents (B, C, H, W).
            t: their sigmas (B,).
            c_concat, c_crossattn, control: passed on as they are.
            transformer_options: the host's options for this call, which are not changed.
            conds: other conditions, among them the reference latents of Flux Kontext.

        Returns:
            The model's output.
        """
        options = transformer_options or {}
        mask = None if self.mask is None else self.mask.taken(conds, x)
        with ExitStack() as stack:
            acting = self._acting(stack, executor.class_obj, x, t, options, conds, mask)
            return executor(x, t, c_concat, c_crossattn, control, acting, **conds)

    def _acting(
        self,
        stack: ExitStack,
        model: Any,
        x: Tensor,
        t: Tensor,
        options: dict[str, Any],
        conds: dict[str, Any],
        mask: Tensor | None,
    ) -> dict[str, Any]:
        """Returns the options of a call in which the patch acts; the same ones where it is off.

        Args:
            stack: holds what is put on the model for this call.
            model: ComfyUI's `BaseModel`.
            x, t, options, conds: see `__call__`.
            mask: where the patch acts in this call (B or 1, 1, H, W).
        """
        settings = self.settings(model, model.model_sampling)
        timesteps, conditional = None, None
        runtime, patch = self.record.loaded.runtime, self.record.loaded.patch
        expert = patch.variant.expert
        if self._slot in ("dit", "after") or expert or runtime.needs_timesteps(settings):
            timesteps = timesteps_of_call(model, self._base, x, t, conds)
        if expert and timesteps is not None:
            self._other_expert(timesteps, options)
        strength = runtime.strengths(settings, timesteps)
        if isinstance(strength, float) and strength == 0.0:
            return options
        if patch.variant.guidance is not None:
            conditional = conditional_items(options, len(x))
        if conditional is not None:
            self._second_call(options)
            if not conditional.any():
                return options

        kept = kept_references(options)
        if kept is not None:
            require_references(patch)
            conds = {**conds, "ref_latents": None} if kept else conds
        prepare = self._prepare(model, x, settings, timesteps, conds, conditional, mask)
        compiled = is_compiled(model, options)
        if self.recompute and self._slot != "outputs":  # The others act outside of the blocks.
            stack.enter_context(recomputing(denoiser_of(model), lambda _: Inside()))
        facts: object = settings, conditional is None, mask is None
        if self._slot in ("hooks", "outputs"):
            require_not_compiled(model, options)
            stack.enter_context(self._hooks(denoiser_of(model), len(x), prepare))
        elif self._slot == "unet":
            options = unet_options(options, self._keys, prepare)
        else:
            context = prepare(time_embedding(model, self._base, timesteps))
            if compiled:
                context, facts = for_compiled(context)
                facts = settings, facts
            if self._slot == "dit":
                options = dit_options(options, self._keys, context)
            else:
                refiners = len(denoiser_of(model).get_submodule("noise_refiner"))
                options = after_options(options, self._keys, context, refiners)
        if compiled:
            stack.enter_context(own_graph(denoiser_of(model), (patch.variant, facts)))
        return options

    def settings(self, model: Any, model_sampling: Any) -> Settings:
        """Converts the user's settings to the core's, by the model sampling in use.

        Args:
            model: ComfyUI's `BaseModel`.
            model_sampling: ComfyUI's object of this name, which other nodes may have replaced.

        Raises:
            PatchError: the model's prediction type or its timesteps are not the patch's.
        """
        if self._known is None or self._known[0] is not model_sampling:
            require_fitting(model, model_sampling, self.record)

            def to_timestep(percent: float) -> float:
                sigma = torch.tensor([model_sampling.percent_to_sigma(percent)])
                return float(timesteps_of(model_sampling, self._base, sigma))

            self._known = model_sampling, self.record.settings(to_timestep)
        return self._known[1]

    def release(self, patcher: Any, unload: bool) -> None:
        """Frees the copies of the patch on other devices when ComfyUI unloads the model.

        Args:
            patcher: ComfyUI's `ModelPatcher` of the model.
            unload: False where another clone of the same model takes its place.
        """
        if unload:
            self.record.loaded.runtime.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapper:
        return self

    def _hooks(
        self, denoiser: nn.Module, items: int, prepare: Prepare
    ) -> AbstractContextManager[None]:
        """Returns the hooks of one call, for what ComfyUI has no slot for."""
        labels = self.record.loaded.patch.variant.condition == "t+y"
        if self._slot == "outputs":
            return modulating(
                denoiser, self._base, self._parts, items, prepare, labels, self.recompute
            )
        return adding(denoiser, self._base, self._sites, prepare, labels)

    def _prepare(
        self,
        model: Any,
        x: Tensor,
        settings: Settings,
        timesteps: Tensor | None,
        conds: dict[str, Any],
        conditional: Tensor | None,
        mask: Tensor | None,
    ) -> Prepare:
        """Returns the function that makes the context of this call from its time embedding."""
        # The patch is copied to the device here, because compiled code cannot copy it.
        runtime = self.record.loaded.runtime.on(x.device)
        latent = latent_of(model, self._base, x, conds)

        def prepare(e: Tensor) -> Context:
            if latent.frames == 1:
                e = e[: latent.batch]  # Qwen-Image-Edit embeds timestep 0 too, after the items.
            return runtime.prepare(
                e,
                latent,
                settings,
                timesteps=timesteps,
                items=self.item_strengths,
                conditional=conditional,
            )

        if mask is None:
            return prepare
        stride = None if self._base.layout == "map" else self._base.sites[0].stride
        return lambda e: MaskedContext(prepare(e), mask, stride)
