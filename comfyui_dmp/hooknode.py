"""The node that makes a hook of a patch."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from comfyui_dmp import hooked, inputs
from dmp_common.attach.record import PatchRecord


class CreateHook(io.ComfyNode):
    """Makes a hook of a patch, for single conditionings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        hooks = io.Custom("HOOKS")
        return inputs.schema(
            aliases="dmp, hook, hook lora, conditioning, regional",
            node_id="DMP_CreateHook",
            display_name="Create Hook DMP",
            description=(
                "Makes a hook of a patch, as Create Hook LoRA does of a LoRA. The patch then acts "
                "for the conditionings that get the hook, such as one area or one prompt, and not "
                "for others. ComfyUI's hook keyframes change its strength along the schedule."
            ),
            inputs=[
                inputs.patch_input(),
                hooks.Input("prev_hooks", optional=True, tooltip="Other hooks, which are kept."),
            ],
            outputs=[
                hooks.Output(
                    display_name="hooks",
                    tooltip="Connect Cond Set Props or Set Hook Keyframes.",
                )
            ],
        )

    @classmethod
    def execute(cls, dmp_patch: PatchRecord, prev_hooks: Any | None = None) -> io.NodeOutput:
        return io.NodeOutput(hooked.hook_of(dmp_patch, prev_hooks))
