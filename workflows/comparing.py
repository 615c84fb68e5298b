"""The workflows that compare pictures, and those that train a patch.

Wires to far columns run above the nodes between, so a loader stands at the top and the columns that
its wires pass begin lower. A test finds wires that run behind a node.
"""

from __future__ import annotations

from typing import Any

from workflows.files import SD35, SD35_Q4
from workflows.flow import FLOWING, Example, Workflow

PROMPTS = """a cat in a garden, morning light
portrait of an old fisherman, weathered face
a red bicycle in front of a brick wall
a mountain lake at sunset, reflections
a bowl of fruit on a wooden table
a crowded street at night, neon signs, rain
a castle on a hill, oil painting
a woman in a yellow raincoat, forest"""


def compare() -> Workflow:
    flow = Example(
        "## Base beside patched\n\nThe same seed through the plain and the patched model. Applying "
        "a patch does not touch the other branch. Drag the slider of *Base | Patched*.",
        {1: 340, 2: 300},
    )
    flow.checkpoint()
    flow.down(0, 340)
    patch = flow.add("DMP_Load", 0, patch_name="sd15-patch.safetensors")
    patched = flow.add("DMP_Apply", 1, model=flow.model, dmp_patch=patch)
    flow.prompts(1)
    flow.pictures(2, {"Base": flow.model, "Patched": patched})
    flow.compare(4, "Base", "Patched")
    return flow


def repair() -> Workflow:
    flow = Example(
        "## A quantised model, repaired\n\nThe same seed through the full model, the model in "
        "Q4_0, and that one with a repair patch, which was trained to bring it back to the full "
        "model. The quantised weights stay as they are. Put the repair patch on the file that it "
        "was made for: **DMP Patch Info** says which. Drag the sliders to compare.",
        {1: 440, 2: 400, 4: 480},
        SD35,
    )
    flow.checkpoint()
    flow.down(0, 1330)
    few = flow.add("UnetLoaderGGUF", 0, unet_name=SD35_Q4)
    flow.prompts(1, negative="")
    repaired = flow.add("DMP_LoadApply", 1, model=few, patch_name="sd35-repair-q4_0.safetensors")
    models = {"Full": flow.model, "Repaired": repaired, "Q4_0": few}
    flow.pictures(2, models, {"Q4_0": 1320}, steps=28, **FLOWING)
    flow.compare(5, "Q4_0", "Full")
    flow.compare(5, "Repaired", "Full")
    return flow


def one_call() -> Workflow:
    flow = Example(
        "## Half the time: no second call\n\nAbove, the plain model with guidance: two calls of "
        "the model a step. Below, a guidance patch at CFG 1: one call. Its strength takes the "
        "place of CFG; 0 is no guidance. Drag the slider to compare both.",
        {1: 340, 2: 300},
    )
    flow.checkpoint()
    file = "sd15-guidance.safetensors"
    guided = flow.add("DMP_LoadApply", 1, model=flow.model, patch_name=file)
    flow.prompts(1)
    models = {"Two calls": flow.model, "One call": guided}
    flow.pictures(2, models, **{"One call": {"cfg": 1.0}})
    flow.compare(4, "Two calls", "One call")
    return flow


def _trained(flow: Example, prefix: str, **training: Any) -> None:
    """Trains a patch, saves it, and shows what it did."""
    given = {"negative": flow.negative, "vae": flow.vae, **training}
    patch = flow.add("DMP_Train", 2, **given)
    loss, beside, drawn = ([patch[0], output] for output in (1, 2, 3))
    flow.add("DMP_Save", 3, dmp_patch=patch, preview=beside, filename_prefix=prefix)
    flow.save(3, "Loss", loss)
    flow.save(3, "Side by side", beside)
    both = {"image": drawn, "batch_index": 0, "length": 2}
    others = flow.add("ImageFromBatch", 3, "The exact model, the cheap one", **both)
    patched = flow.add("ImageFromBatch", 3, "With the patch", image=drawn, batch_index=2, length=1)
    title = "Exact or cheap | with the patch"
    flow.add("ImageCompare", 4, title, image_a=others, image_b=patched)


def _prompted(flow: Example, negative: str) -> list[Any]:
    """Adds the prompts of a training; returns their list."""
    flow.negative = flow.text(1, "Negative", negative)
    return flow.add("DMP_Prompts", 1, clip=flow.clip, text=PROMPTS, file="None")


_SLIDE = (
    "*Side by side* shows all three from noise that was not trained on, and the slider lays the "
    "patched picture over the exact model's or, with its arrows, over the cheap one's"
)


def train_repair() -> Workflow:
    flow = Example(
        "## Repair your GGUF model\n\nChoose the full model and its quantised file. **Train DMP "
        "Patch** lets the full model draw from the prompts, and trains a patch with which the "
        "quantised one predicts the same. It needs no pictures. Stop it when the curve is flat: "
        f"what is trained so far is saved to **models/dmp**. {_SLIDE}. Use the patch with the "
        "workflow **dmp-repair-quantised**.",
        {0: 640, 2: 640, 3: 220, 4: 1300},
        SD35,
    )
    flow.checkpoint()
    few = flow.add("UnetLoaderGGUF", 0, unet_name=SD35_Q4)
    listed = _prompted(flow, "")
    facts = {"cfg": 4.5, "scheduler": "sgm_uniform", "width": 768, "height": 768}
    models = {"model": few, "teacher_model": flow.model}
    _trained(flow, "repair/sd35-q4_0", positive=listed, **models, **facts)
    return flow


def train_guidance() -> Workflow:
    flow = Example(
        "## Make your checkpoint twice as fast\n\n**Train DMP Patch** trains a patch that predicts "
        "with one call of the model a step what CFG needs two for. It needs no pictures, only "
        "prompts like those that you will use. Stop it when the curve is flat: what is trained so "
        f"far is saved to **models/dmp**. {_SLIDE}. Use the patch with the workflow "
        "**dmp-one-call**.",
        {0: 640, 2: 640, 3: 220, 4: 1300},
    )
    flow.checkpoint()
    listed = _prompted(flow, "blurry")
    _trained(flow, "guidance/sd15", positive=listed, model=flow.model, objective="guidance")
    return flow
