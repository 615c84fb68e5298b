"""The inputs and schemas that the nodes share."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from comfyui_dmp import files

CATEGORY = "DMP"
DmpPatch = io.Custom("DMP_PATCH")
ADVANCED = {"advanced": True}  # The interface hides such inputs until they are asked for.


def schema(aliases: str, **facts: Any) -> io.Schema:
    """Returns the schema of a node of ours.

    Args:
        aliases: other words by which a search finds the node, with commas. ComfyUI 0.8 knows none.
        facts: the other arguments of `io.Schema`.
    """
    if any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema)):
        facts["search_aliases"] = aliases.split(", ")
    return io.Schema(category=CATEGORY, **facts)


def model_input() -> io.Model.Input:
    tooltip = "The model to patch. It must be of the base the patch was trained for."
    return io.Model.Input("model", tooltip=tooltip)


def model_output() -> io.Model.Output:
    return io.Model.Output(display_name="model", tooltip="The patched model.")


def patch_input() -> Any:
    tooltip = "A patch from Load DMP Patch, or its settings from DMP Gate Strength."
    return DmpPatch.Input("dmp_patch", tooltip=tooltip)


def file_input() -> io.Combo.Input:
    tooltip = "A .safetensors file of models/dmp. Press R after adding a file."
    return io.Combo.Input("patch_name", options=files.patch_files(), tooltip=tooltip)


def strength_input(name: str = "strength") -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.01,
        tooltip="Multiplies what the patch adds. 0 is exactly the plain model, 1 as trained.",
    )


def temperature_input() -> io.Float.Input:
    tooltip = "Of the gate: above 1 all prompts speak more evenly, below 1 fewer."
    limits = {"default": 1.0, "min": 0.05, "max": 20.0, "step": 0.05}
    return io.Float.Input("temperature", **limits, tooltip=tooltip, extra_dict=ADVANCED)


def range_inputs(optional: bool = False) -> tuple[io.Float.Input, io.Float.Input]:
    """Returns the inputs for the points of denoising between which a patch acts."""
    limits = {"min": 0.0, "max": 1.0, "step": 0.001, "optional": optional, "extra_dict": ADVANCED}
    start = "When the patch begins to act: 0 is pure noise."
    end = "When it stops: 1 is the finished picture."
    return (
        io.Float.Input("start_percent", default=0.0, tooltip=start, **limits),
        io.Float.Input("end_percent", default=1.0, tooltip=end, **limits),
    )


def mask_input(remark: str = "") -> io.Mask.Input:
    tooltip = (
        "Where in the picture the patch acts: fully where the mask is white, not at all where it "
        f"is black. One mask, or one for each picture of the batch. {remark}"
    )
    return io.Mask.Input("mask", optional=True, tooltip=tooltip.strip())


def keyframes_input(remark: str) -> io.String.Input:
    tooltip = (
        "A curve of the strength as text: progress (0 is pure noise, 1 the finished picture), a "
        "colon and a factor, with straight lines in between: 0: 1, 0.5: 0.3, 1: 0. "
        f"{remark} Empty is no curve."
    )
    return io.String.Input(
        "keyframes", default="", optional=True, tooltip=tooltip, extra_dict=ADVANCED
    )


def site_strengths_input() -> io.String.Input:
    tooltip = (
        "Factors of the strength at single sites: in.1-3: 0.5, mid: 1, out.*: 0. Ranges and stars "
        "are allowed; sites that are not named keep 1. DMP Patch Info lists the names."
    )
    return io.String.Input(
        "site_strengths", default="", optional=True, tooltip=tooltip, extra_dict=ADVANCED
    )


def factor(name: str, when: str) -> io.Float.Input:
    tooltip = f"Multiplies the strength {when}; linear in between. 1, 1, 1 is no curve."
    limits = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}
    return io.Float.Input(name, **limits, tooltip=tooltip, extra_dict=ADVANCED)
