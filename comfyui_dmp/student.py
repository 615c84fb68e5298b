"""Trains a patch on a cheap ComfyUI model, through ComfyUI's own model call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from comfyui_dmp.fitting import (
    Gap,
    Predict,
    Recipe,
    fit,
    measured_gap,
    suited_rate,
    weighted_gap,
)
from comfyui_dmp.gradients import ATTENTION, attention, training, weights_with_gradients
from comfyui_dmp.host import KEY, Wrapper
from comfyui_dmp.memory import asking_for_training, separate_weights
from comfyui_dmp.predictions import as_output
from comfyui_dmp.states import States, batches
from dmp_common import PatchError
from dmp_common.attach.record import LoadedPatch, PatchRecord


@dataclass(frozen=True)
class Learned:
    """What a training came to.

    Args:
        rate: the learning rate that was used.
        left: the share of the gap that is left at states that were not trained on.
        better: whether the patch is better than the one that the training began with.
    """

    rate: float
    left: float
    better: bool


class Student(comfy.samplers.CFGGuider):  # type: ignore[misc]
    """A guider of ComfyUI that loads the cheap model, and then trains a patch on it.

    Args:
        model: ComfyUI's `ModelPatcher` of the cheap model, which is not changed.
        loaded: the patch, on the CPU.
        recompute: whether the backward pass recomputes the model's blocks, to need less memory.
    """

    def __init__(self, model: Any, loaded: LoadedPatch, recompute: bool) -> None:
        clone = _trainable(model)
        self.patch = loaded.patch
        self.wrapper = Wrapper(PatchRecord(loaded))
        self.wrapper.recompute = recompute
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.wrapper)
        asking = asking_for_training(self.patch.base.layout, recompute)
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, asking)
        # Not every attention that users choose has a backward pass.
        clone.model_options["transformer_options"][ATTENTION] = attention
        super().__init__(clone)

    def train(
        self,
        states: States,
        held: States,
        conditionings: list[Any],
        recipe: Recipe,
        at_once: int,
        seed: int,
        told: Callable[[int, float, float], bool],
    ) -> Learned:
        """Trains the patch. An interrupt ends the training and keeps what is learned.

        A patch that is further from the exact model than it was before does not come out: then the
        one that the training began with stays.

        Args:
            states: with the exact predictions.
            held: others, which show what was learned.
            conditionings: ComfyUI's, by the numbers in the states; those of no state may be None.
            recipe: steps and learning rate.
            at_once: states of a step.
            seed: of their order.
            told: is called after each step with the number of steps done, the loss, and the gap
                before training; returns whether to go on.
        """
        self.inner_set_conds(
            {str(n): cond for n, cond in enumerate(conditionings) if cond is not None}
        )
        learned: list[Learned] = []

        def run(predict: Predict, device: torch.device, half: bool) -> None:
            self.patch.to(device)
            gap = measured_gap(_without_patch(predict), states, seed, at_once)
            rate = recipe.learning_rate or suited_rate(gap.size)
            numbers = batches(len(states), at_once, seed)
            done: list[int] = []

            def all_told(step: int, loss: float) -> bool:
                done.append(step)
                return told(step, loss, gap.mean)

            def steps() -> None:
                own = replace(recipe, learning_rate=rate)
                try:
                    fit(self.patch, predict, states, numbers, own, gap.weights, all_told, half)
                except comfy.model_management.InterruptProcessingException:
                    if not done:
                        raise  # There is nothing to keep.

            plain = weighted_gap(_without_patch(predict), held, gap.weights, at_once)
            left, kept = self._better(predict, held, gap, at_once, steps)
            learned.append(Learned(rate, left / plain, kept))

        shape = (at_once, *states.noisy.shape[1:])
        try:
            with training(self.patch.base.layout == "tokens"), separate_weights():
                self.sample(
                    torch.zeros(shape),
                    torch.zeros(shape),
                    _Fitting(run),
                    torch.tensor([1.0, 0.0]),
                    disable_pbar=True,
                    seed=seed,
                )
        finally:
            self.patch.to("cpu").eval().requires_grad_(False)
        return learned[0]

    def _better(
        self,
        predict: Predict,
        held: States,
        gap: Gap,
        at_once: int,
        steps: Callable[[], None],
    ) -> tuple[float, bool]:
        """Trains; takes the values from before where the new ones are not better.

        Returns:
            The gap that is left at the states held back, and whether the new values were kept.
        """
        patch = self.patch
        start = {name: value.detach().clone() for name, value in patch.state_dict().items()}
        before = weighted_gap(predict, held, gap.weights, at_once)
        patch.train().requires_grad_(True)
        steps()
        patch.eval()
        after = weighted_gap(predict, held, gap.weights, at_once)
        if after < before:
            return after, True
        patch.load_state_dict(start)
        return before, False

    def predict(self, number: int, states: States, options: Any) -> Tensor:
        """Returns what the cheap model with the patch puts out (B, ...), float32.

        Args:
            number: of the conditioning.
            states: of this conditioning.
            options: the model options of the call.
        """
        model = self.inner_model
        device = self.model_patcher.load_device
        x, sigmas = states.noisy.to(device), states.sigmas.to(device)
        self.wrapper.item_strengths = states.strengths
        conds = [self.conds[str(number)]]
        (denoised,) = comfy.samplers.calc_cond_batch(model, conds, x, sigmas, options)
        return as_output(model.model_sampling, denoised.float(), x, sigmas)


class _Fitting(comfy.samplers.Sampler):  # type: ignore[misc]
    """What ComfyUI takes for a sampler: it trains."""

    def __init__(self, run: Callable[[Predict, torch.device, bool], None]) -> None:
        self._run = run

    def sample(
        self,
        model_wrap: Student,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Trains, and returns latents that nobody looks at."""
        options, model = extra_args["model_options"], model_wrap.inner_model
        computes = model.manual_cast_dtype or model.get_dtype()
        with weights_with_gradients(model):
            self._run(
                lambda number, states: model_wrap.predict(number, states, options),
                noise.device,
                computes == torch.float16,
            )
        return torch.zeros_like(noise)


def _trainable(model: Any) -> Any:
    """Returns a clone whose weights stay where they are between forward and backward pass.

    Dynamic VRAM of current versions of ComfyUI may take a weight away as soon as its layer is done.

    Args:
        model: ComfyUI's `ModelPatcher`.

    Raises:
        PatchError: ComfyUI cannot load the model in another way.
    """
    if not getattr(model, "is_dynamic", bool)():  # ComfyUI 0.8 has none
        return model.clone()
    if model.cached_patcher_init is None:
        raise PatchError(
            "expected a MODEL that ComfyUI can load without dynamic VRAM for training, found one "
            "whose loader does not say how: use ComfyUI's own loader, or start ComfyUI with "
            "--disable-dynamic-vram."
        )
    return model.clone(disable_dynamic=True)


def _without_patch(predict: Predict) -> Predict:
    def plain(number: int, states: States) -> Tensor:
        return predict(number, replace(states, strengths=torch.zeros(len(states))))

    return plain
