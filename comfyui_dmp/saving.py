"""The node that writes a patch into models/dmp."""

from __future__ import annotations

import numpy as np
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from comfyui_dmp import inputs, trained
from comfyui_dmp.inputs import DmpPatch
from dmp_common.attach.record import PatchRecord


class SavePatch(io.ComfyNode):
    """Writes a patch into models/dmp."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, save patch, save lora, export",
            node_id="DMP_Save",
            display_name="Save DMP Patch",
            description=(
                "Writes a patch into models/dmp under a new name, with what it was trained for, "
                "and a preview picture beside it. A file that exists is never replaced."
            ),
            is_output_node=True,
            inputs=[
                DmpPatch.Input("dmp_patch", tooltip="A patch from Train DMP Patch."),
                io.String.Input(
                    "filename_prefix",
                    default="my-patch",
                    tooltip=(
                        "The name without ending; a number is added. A subfolder may come before "
                        "it: repair/my-model. %year%, %month% and %day% stand for the date."
                    ),
                ),
                io.Image.Input(
                    "preview",
                    optional=True,
                    tooltip="Its first picture is written beside the patch, as a .png file.",
                ),
                io.String.Input(
                    "author",
                    default="",
                    optional=True,
                    tooltip="Written into the file. Empty is nobody.",
                    extra_dict=inputs.ADVANCED,
                ),
                io.String.Input(
                    "notes",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="A description, written into the file.",
                    extra_dict=inputs.ADVANCED,
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="patch_name", tooltip="The name of the file inside of models/dmp."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        dmp_patch: PatchRecord,
        filename_prefix: str,
        preview: Tensor | None = None,
        author: str = "",
        notes: str = "",
    ) -> io.NodeOutput:
        words = {"modelspec.author": author.strip(), "modelspec.description": notes.strip()}
        path = trained.saved_as(
            dmp_patch, filename_prefix, {name: text for name, text in words.items() if text}
        )
        if preview is not None:
            pixels = preview.reshape(-1, *preview.shape[-3:])[0, ..., :3]
            shown = (pixels.float().cpu().numpy() * 255).round().clip(0, 255)
            Image.fromarray(shown.astype(np.uint8)).save(path.with_suffix(".png"))
        name = trained.name_of(path)
        return io.NodeOutput(name, ui={"text": (f"saved as {name}",)})
