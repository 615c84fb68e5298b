"""The workflows that use a patch.

Wires to far columns run above the nodes between, so a loader stands at the top and the columns that
its wires pass begin lower. A test finds wires that run behind a node.
"""

from __future__ import annotations

from typing import Any

from workflows.files import SD35, SDXL
from workflows.flow import FLOWING, GARDEN, Example, Workflow

PATCH, OTHER = "sd15-patch.safetensors", "sd15-other.safetensors"


def basic() -> Workflow:
    flow = Example(
        "## A patched model\n\n**Load DMP Patch** reads a patch, **Apply DMP** puts it on the "
        "model. Nothing else changes.",
        {1: 120, 2: 120},
    )
    flow.checkpoint()
    patch = flow.add("DMP_Load", 0, patch_name=PATCH)
    patched = flow.add("DMP_Apply", 1, model=flow.model, dmp_patch=patch)
    flow.prompts(1)
    flow.pictures(2, {"Patched": patched})
    return flow


def _settings(note: str, name: str, **settings: Any) -> Workflow:
    """A workflow with a patch whose settings are chosen."""
    flow = Example(note, {0: 200, 2: 120, 3: 120})
    patch = flow.add("DMP_Load", 0, patch_name=PATCH)
    flow.checkpoint(1)
    patch = flow.add("DMP_GateStrength", 1, dmp_patch=patch, **settings)
    patched = flow.add("DMP_Apply", 2, model=flow.model, dmp_patch=patch)
    flow.prompts(2)
    flow.pictures(3, {name: patched})
    return flow


def curve() -> Workflow:
    return _settings(
        "## Strength along the denoising\n\n**DMP Gate Strength** multiplies the strength by "
        "early, middle and late, linear in between. Here the patch is strong while the "
        "composition forms, and fades out where details form.",
        "Curve",
        early=1.2,
        middle=0.6,
        late=0.0,
    )


def keyframes() -> Workflow:
    return _settings(
        "## Keyframes, and strengths at single places\n\n**keyframes** is a curve with points of "
        "your own: progress (0 is pure noise, 1 the finished picture), a colon, and a factor. "
        "**site_strengths** has factors for single places of the model; **DMP Patch Info** lists "
        "the names, and so does the button of **DMP Gate Strength**. Both are among its advanced "
        "inputs.",
        "Keyframes",
        keyframes="0: 1, 0.4: 1, 0.6: 0.3, 1: 0",
        site_strengths="all: 1, in.1-3: 0.5",
    )


def mask() -> Workflow:
    flow = Example(
        "## Each patch in its part of the picture\n\nThe first patch acts where its mask is white, "
        "on the left: **DMP Gate Strength** has the mask. The second one has the inverted mask, "
        "given to **Apply DMP**. Any other mask serves, such as one that you paint in *Load "
        "Image*.",
        {0: 640, 1: 200, 3: 120, 4: 120, 5: 300},
    )
    size = {"height": 512}
    nothing = flow.add("SolidMask", 0, "Black", value=0.0, width=512, **size)
    white = flow.add("SolidMask", 0, "White", value=1.0, width=256, **size)
    patch = flow.add("DMP_Load", 1, patch_name=PATCH)
    flow.down(1, 640)
    both = {"destination": nothing, "source": white, "x": 0, "y": 0, "operation": "add"}
    left = flow.add("MaskComposite", 1, "Left half", **both)
    flow.checkpoint(2)
    patch = flow.add("DMP_GateStrength", 2, dmp_patch=patch, mask=left)
    patched = flow.add("DMP_Apply", 3, "Apply: left", model=flow.model, dmp_patch=patch)
    flow.prompts(3)
    given = {
        "dmp_patch": flow.add("DMP_Load", 3, patch_name=OTHER),
        "mask": flow.add("InvertMask", 3, "Right half", mask=left),
    }
    patched = flow.add("DMP_Apply", 4, "Apply: right", model=patched, **given)
    flow.pictures(5, {"Masked": patched})
    return flow


def hook() -> Workflow:
    flow = Example(
        "## A patch for one prompt alone\n\nTwo prompts, each with its half of the picture. "
        "**Create Hook DMP** makes a hook of the patch, as *Create Hook LoRA* does of a LoRA; the "
        "patch acts for the left prompt alone, and *Create Hook Keyframe* sets its strength: half "
        "of it in the second half of denoising.",
        {1: 200, 2: 200, 3: 140, 4: 80},
    )
    flow.checkpoint()
    patch = flow.add("DMP_Load", 0, patch_name=PATCH)
    first = flow.add("CreateHookKeyframe", 0, "First half", strength_mult=1.0, start_percent=0.0)
    hooks = flow.add("DMP_CreateHook", 1, dmp_patch=patch)
    later = {"prev_hook_kf": first, "strength_mult": 0.5, "start_percent": 0.5}
    frames = flow.add("CreateHookKeyframe", 1, "Second half", **later)
    prompts = {"Left": GARDEN, "Right": "a red bicycle in front of a brick wall"}
    halves = [flow.text(1, title, text) for title, text in prompts.items()]
    hooks = flow.add("SetHookKeyframes", 2, hooks=hooks, hook_kf=frames)
    area = {"width": 256, "height": 512, "y": 0, "strength": 1.0}
    left, right = (
        flow.add("ConditioningSetArea", 2, conditioning=half, x=256 * i, **area)
        for i, half in enumerate(halves)
    )
    flow.negative = flow.text(3, "Negative", "blurry")
    given = {"cond": right, "cond_NEW": left, "hooks": hooks}
    flow.positive = flow.add("ConditioningSetPropertiesAndCombine", 3, **given)
    flow.latent(3)
    flow.pictures(4, {"Hook": flow.model})
    return flow


def heatmap() -> Workflow:
    flow = Example(
        "## What the gate does\n\nThe weights of all prompts at the steps of a scheduler, and what "
        "the file says about itself.",
        {3: 464},
    )
    flow.checkpoint()
    patch = flow.add("DMP_Load", 0, patch_name=PATCH)
    image = flow.add("DMP_GateHeatmap", 1, dmp_patch=patch, model=flow.model)
    text = flow.add("DMP_PatchInfo", 1, dmp_patch=patch)
    flow.save(2, "Heatmap", image)
    flow.add("PreviewAny", 2, source=text)
    return flow


def _one_patch(note: str, file: str, patch: str, name: str, **sampling: Any) -> Workflow:
    """A workflow that loads and applies a patch in one node."""
    flow = Example(note, {1: 120, 2: 120}, file)
    flow.checkpoint()
    patched = flow.add("DMP_LoadApply", 1, model=flow.model, patch_name=patch)
    flow.prompts(1, negative="")
    flow.pictures(2, {name: patched}, **sampling)
    return flow


def sdxl() -> Workflow:
    note = (
        "## SDXL\n\nFor the SDXL base and its fine-tunes. The refiner is another model and takes "
        "no patch."
    )
    return _one_patch(note, SDXL, "sdxl-patch.safetensors", "SDXL", steps=25)


def sd35() -> Workflow:
    note = (
        "## A diffusion transformer\n\nSD 3.5; the same nodes serve the other transformers: "
        "FLUX.1, FLUX.2, Qwen-Image, Z-Image, Lumina 2 and PixArt."
    )
    return _one_patch(note, SD35, "sd35-patch.safetensors", "SD35", steps=28, **FLOWING)


def stacked() -> Workflow:
    flow = Example(
        "## Two patches\n\nWhat they add is summed; the order does not matter. Give each its own "
        "strength.",
        {1: 120, 2: 120, 3: 300},
    )
    flow.checkpoint()
    first = {"patch_name": PATCH, "strength": 0.8}
    model = flow.add("DMP_LoadApply", 1, model=flow.model, **first)
    second = {"patch_name": OTHER, "strength": 0.5}
    model = flow.add("DMP_LoadApply", 2, model=model, **second)
    flow.down(1, 330)
    flow.prompts(1)
    flow.pictures(3, {"Stacked": model})
    return flow


def stack() -> Workflow:
    flow = Example(
        "## Several patches in one node\n\n**Stack DMP Patches** has four rows with a switch and a "
        "strength. It equals as many **Load & Apply DMP** nodes, one after the other. Here the "
        "second row is off.",
        {1: 120, 2: 120},
    )
    flow.checkpoint()
    rows = {"patch_1": PATCH, "strength_1": 0.8, "on_2": False, "patch_2": OTHER}
    model = flow.add("DMP_Stack", 1, model=flow.model, **rows)
    flow.prompts(1)
    flow.pictures(2, {"Stack": model})
    return flow
