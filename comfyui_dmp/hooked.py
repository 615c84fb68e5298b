"""A patch as one of ComfyUI's hooks: it acts for single conditionings, as a LoRA hook does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.hooks
from comfy.patcher_extension import WrappersMP, merge_nested_dicts

from comfyui_dmp.host import KEY, Wrapper
from dmp_common import PatchError
from dmp_common.attach.record import PatchRecord


class PatchHook(comfy.hooks.TransformerOptionsHook):  # type: ignore[misc]
    """Puts a patch on the calls of the model for the conditionings that have the hook.

    ComfyUI clones hooks, and asks each clone at every step for what it adds. The strength of its
    keyframe is then known, which it sets before.

    Attributes:
        record: the patch; None only while ComfyUI makes a clone.
    """

    record: PatchRecord | None = None

    def __init__(self, record: PatchRecord | None = None) -> None:
        super().__init__(hook_scope=comfy.hooks.EnumHookScope.HookedOnly)
        self.record = record
        self._wrappers: dict[float, Wrapper] = {}
        # In it ComfyUI looks for tensors to move to the device: there are none.
        self.transformers_dict: dict[str, Any] = {}

    def clone(self) -> PatchHook:
        """Returns a hook for the same patch, which may get other keyframes."""
        clone: PatchHook = super().clone()
        clone.record, clone._wrappers = self.record, self._wrappers
        return clone

    def add_hook_patches(
        self,
        model: Any,
        model_options: dict[str, Any],
        target_dict: dict[str, Any],
        registered: Any,
    ) -> bool:
        """Registers the hook for a sampling.

        Args:
            model: ComfyUI's `ModelPatcher`.
            model_options, target_dict, registered: passed on as they are.

        Raises:
            PatchError: the model is not of the patch's base.
        """
        self._wrapper(1.0).check(model)
        added: bool = super().add_hook_patches(model, model_options, target_dict, registered)
        return added

    def on_apply_hooks(self, model: Any, transformer_options: dict[str, Any]) -> None:
        """Adds the patch to the options of the calls of a step, at the strength of the keyframe.

        Args:
            model: ComfyUI's `ModelPatcher`.
            transformer_options: of these calls.
        """
        wrapper = self._wrapper(float(self.strength))
        added = {"wrappers": {WrappersMP.APPLY_MODEL: {KEY: [wrapper]}}}
        merge_nested_dicts(transformer_options, added, copy_dict1=False)

    def _wrapper(self, factor: float) -> Wrapper:
        """Returns what acts at a factor of the strength; clones of the hook share it."""
        assert self.record is not None
        if factor not in self._wrappers:
            scaled = replace(self.record, strength=factor * self.record.strength)
            self._wrappers[factor] = Wrapper(scaled)
        return self._wrappers[factor]


def hook_of(record: PatchRecord, previous: Any | None = None) -> Any:
    """Returns ComfyUI's HOOKS with a patch.

    Args:
        record: the patch and its settings.
        previous: ComfyUI's HOOKS to add it to, which are not changed.

    Raises:
        PatchError: the patch has a mask.
    """
    if record.mask is not None:
        raise PatchError(
            f"{record.loaded.name}: expected a patch without a mask for a hook, found one: give "
            "the mask to Cond Set Props, together with the hook."
        )
    group = comfy.hooks.HookGroup() if previous is None else previous.clone()
    group.add(PatchHook(record))
    return group
