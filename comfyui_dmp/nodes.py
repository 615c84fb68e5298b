"""The nodes that users see. They only pass their inputs on to `host.py` and `files.py`.

Node ids must never change, because saved workflows refer to them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.samplers
import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from comfyui_dmp import files, heatmaps, host, inputs, pictures, places
from comfyui_dmp.hooknode import CreateHook
from comfyui_dmp.inputs import DmpPatch
from comfyui_dmp.promptlist import Prompts
from comfyui_dmp.saving import SavePatch
from comfyui_dmp.stack import Stack
from comfyui_dmp.trainnode import TrainPatch
from dmp_common.attach.record import PatchRecord
from dmp_common.tools import written
from dmp_common.tools.heatmap import choose_sites, gate_heatmap
from dmp_common.tools.inspect import as_text, inspect_file

_LISTED = 80  # sites of a patch that its description lists
_LABEL = "Only for patches whose gate sees the class (condition t+y)."


class LoadPatch(io.ComfyNode):
    """Loads a patch file from models/dmp."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, load patch, lora, prompt patch, model patch",
            node_id="DMP_Load",
            display_name="Load DMP Patch",
            description="Loads a DMP patch file. Connect it to Apply DMP.",
            inputs=[inputs.file_input()],
            outputs=[DmpPatch.Output(display_name="dmp_patch", tooltip="The patch, as trained.")],
        )

    @classmethod
    def validate_inputs(cls, patch_name: str | None = None) -> bool | str:
        return files.refusal(patch_name) or True

    @classmethod
    def fingerprint_inputs(cls, patch_name: str) -> str:
        return files.fingerprint(patch_name)

    @classmethod
    def execute(cls, patch_name: str) -> io.NodeOutput:
        return io.NodeOutput(files.load(patch_name))


class Apply(io.ComfyNode):
    """Attaches a patch to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, apply patch, lora, model patch, guidance, repair",
            node_id="DMP_Apply",
            display_name="Apply DMP",
            description=(
                "Puts a patch on a model: at every noise level it adds the prompts that its gate "
                "chooses to the inputs of the model's blocks, or scales and shifts the outputs of "
                "its layers. Chain several. The model itself stays as it is, so other branches of "
                "the workflow are not affected."
            ),
            inputs=[
                inputs.model_input(),
                inputs.patch_input(),
                inputs.mask_input("It takes the place of a mask of DMP Gate Strength."),
                inputs.keyframes_input("They take the place of the curve of DMP Gate Strength."),
            ],
            outputs=[inputs.model_output()],
        )

    @classmethod
    def execute(
        cls, model: Any, dmp_patch: PatchRecord, mask: Tensor | None = None, keyframes: str = ""
    ) -> io.NodeOutput:
        points, record = written.keyframes(keyframes), dmp_patch
        if points:
            record = dataclasses.replace(record, keyframes=points, curve=(1.0, 1.0, 1.0))
        if mask is not None:
            record = dataclasses.replace(record, mask=mask)
        return io.NodeOutput(host.attach(model, record))


class LoadApply(io.ComfyNode):
    """Loads a patch file and attaches it in one node, like ComfyUI's LoRA loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, load patch, apply patch, lora, load lora, model patch",
            node_id="DMP_LoadApply",
            display_name="Load & Apply DMP",
            description="Loads a patch file and puts it on a model, in one node.",
            inputs=[
                inputs.model_input(),
                inputs.file_input(),
                inputs.strength_input(),
                *inputs.range_inputs(optional=True),
            ],
            outputs=[inputs.model_output()],
        )

    @classmethod
    def validate_inputs(cls, patch_name: str | None = None) -> bool | str:
        return files.refusal(patch_name) or True

    @classmethod
    def fingerprint_inputs(cls, patch_name: str, **others: Any) -> str:
        return files.fingerprint(patch_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        patch_name: str,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        record = files.load(patch_name)
        used = {"strength": strength, "start": start_percent, "end": end_percent}
        return io.NodeOutput(host.attach(model, dataclasses.replace(record, **used)))


class GateStrength(io.ComfyNode):
    """Sets how strongly, when and where a patch acts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, patch strength, patch schedule, keyframes, mask",
            node_id="DMP_GateStrength",
            display_name="DMP Gate Strength",
            description=(
                "How strongly, when and where a patch acts. The curve multiplies the strength: "
                "early at the start of denoising, middle half-way, late at its end, and in "
                "between by interpolation. It replaces settings made before it."
            ),
            inputs=[
                inputs.patch_input(),
                inputs.strength_input(),
                *inputs.range_inputs(),
                inputs.factor("early", "at the start of denoising, where the composition forms"),
                inputs.factor("middle", "half-way"),
                inputs.factor("late", "at the end of denoising, where details form"),
                inputs.temperature_input(),
                io.String.Input(
                    "sites",
                    default="all",
                    tooltip=(
                        "Which block inputs the patch acts on: all, a named set (encoder, "
                        "decoder, blocks), or names with commas (in.1-3, mid, out.*). DMP Patch "
                        "Info lists them."
                    ),
                    extra_dict=inputs.ADVANCED,
                ),
                inputs.site_strengths_input(),
                inputs.keyframes_input("They take the place of early, middle and late."),
                inputs.mask_input(),
            ],
            outputs=[DmpPatch.Output(display_name="dmp_patch", tooltip="The patch, used so.")],
        )

    @classmethod
    def execute(
        cls,
        dmp_patch: PatchRecord,
        strength: float,
        start_percent: float,
        end_percent: float,
        early: float,
        middle: float,
        late: float,
        temperature: float,
        sites: str,
        site_strengths: str = "",
        keyframes: str = "",
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        patch, chosen = dmp_patch.loaded.patch, choose_sites(dmp_patch.loaded.patch, sites)
        record = PatchRecord(
            dmp_patch.loaded,
            strength=strength,
            start=start_percent,
            end=end_percent,
            curve=(early, middle, late),
            temperature=temperature,
            sites=None if len(chosen) == len(patch.sites) else frozenset(chosen),
            keyframes=written.keyframes(keyframes),
            site_strengths=written.site_strengths(patch, site_strengths),
            mask=mask,
        )
        return io.NodeOutput(record)


class GateHeatmap(io.ComfyNode):
    """Draws the gate of a patch for a model, as in Figure 4 of the AAAI 2025 text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, gate, plot, visualise",
            node_id="DMP_GateHeatmap",
            display_name="DMP Gate Heatmap",
            description=(
                "Draws which prompts the gate of a patch lets speak at each step of a scheduler: a "
                "row for each site, by prompt and as maps over the picture."
            ),
            inputs=[
                inputs.patch_input(),
                io.Model.Input(
                    "model", tooltip="The model whose time embedding the gate sees; not changed."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="normal",
                    tooltip="Its noise levels are drawn, as in the KSampler.",
                ),
                io.Int.Input(
                    "steps", default=30, min=2, max=1000, tooltip="How many noise levels to draw."
                ),
                io.String.Input(
                    "sites",
                    default="first, middle, last",
                    tooltip="Which sites to draw: first, middle, last, all, or names with commas.",
                ),
                io.Combo.Input(
                    "scale",
                    options=["per-panel", "shared"],
                    tooltip="Whether each row has its own colours, or all share one scale.",
                ),
                io.Int.Input("class_label", default=0, min=0, optional=True, tooltip=_LABEL),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The heat map.")],
        )

    @classmethod
    def execute(
        cls,
        dmp_patch: PatchRecord,
        model: Any,
        scheduler: str,
        steps: int,
        sites: str,
        scale: Any,
        class_label: int = 0,
    ) -> io.NodeOutput:
        e, timesteps = heatmaps.gate_embedding(model, dmp_patch, scheduler, steps, class_label)
        loaded, title = dmp_patch.loaded, f"Gate of {dmp_patch.loaded.name}"
        image = gate_heatmap(loaded.patch, timesteps, e, sites=sites, scale=scale, title=title)
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        return io.NodeOutput(torch.from_numpy(pixels)[None])  # (1, H, W, 3)


class PatchInfo(io.ComfyNode):
    """Shows the description that a patch file carries."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, metadata, hash, patch info",
            node_id="DMP_PatchInfo",
            display_name="DMP Patch Info",
            description="What a patch is made of, as text: base, hash, sites, data and steps.",
            inputs=[inputs.patch_input()],
            outputs=[io.String.Output(display_name="text", tooltip="Connect Preview as Text.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dmp_patch: PatchRecord) -> io.NodeOutput:
        record = {**inspect_file(dmp_patch.loaded.path), "file": dmp_patch.loaded.name}
        text = as_text(record, list_sites=len(record["sites"]) <= _LISTED)
        return io.NodeOutput(text, ui={"text": (text,)})


class Extension(ComfyExtension):
    """The custom node pack, as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        files.register_folder()
        pictures.register()
        places.register()
        used = [LoadPatch, Apply, GateStrength, LoadApply, GateHeatmap, PatchInfo, Stack]
        return [*used, CreateHook, Prompts, TrainPatch, SavePatch]
