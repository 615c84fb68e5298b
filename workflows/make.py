"""Writes the example workflows: for the browser here, in API format in `api/`.

    python workflows/make.py

A test compares the files with what this makes, and checks them against the nodes' schemas.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent

_STRENGTH = {
    "strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "early": 1.2,
    "middle": 0.6,
    "late": 0.0,
    "temperature": 1.0,
    "sites": "all",
}
_TRAINING = {
    "objective": "repair",
    "cfg": 7.0,
    "all_scales": True,
    "width": 512,
    "height": 512,
    "pictures": 64,
    "steps": 1000,
    "seed": 0,
    "learning_rate": 0.0,
    "batch_size": 4,
    "sampler_name": "euler",
    "scheduler": "normal",
    "sampling_steps": 20,
}
# Sockets, widgets and outputs of the nodes used; the test compares them with ComfyUI's.
NODES: dict[str, tuple[dict[str, str], list[str], list[tuple[str, str]]]] = {
    "CheckpointLoaderSimple": (
        {},
        ["ckpt_name"],
        [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")],
    ),
    "UnetLoaderGGUF": ({}, ["unet_name"], [("MODEL", "MODEL")]),  # of ComfyUI-GGUF
    "CLIPTextEncode": ({"clip": "CLIP"}, ["text"], [("CONDITIONING", "CONDITIONING")]),
    "EmptyLatentImage": ({}, ["width", "height", "batch_size"], [("LATENT", "LATENT")]),
    "EmptySD3LatentImage": ({}, ["width", "height", "batch_size"], [("LATENT", "LATENT")]),
    "KSampler": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
        },
        ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        [("LATENT", "LATENT")],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, [], [("IMAGE", "IMAGE")]),
    "SaveImage": ({"images": "IMAGE"}, ["filename_prefix"], []),
    "PreviewAny": ({"source": "*"}, [], []),
    "DMP_Load": ({}, ["patch_name"], [("dmp_patch", "DMP_PATCH")]),
    "DMP_Apply": ({"model": "MODEL", "dmp_patch": "DMP_PATCH"}, [], [("model", "MODEL")]),
    "DMP_LoadApply": ({"model": "MODEL"}, ["patch_name", "strength"], [("model", "MODEL")]),
    "DMP_GateStrength": (
        {"dmp_patch": "DMP_PATCH"},
        list(_STRENGTH),
        [("dmp_patch", "DMP_PATCH")],
    ),
    "DMP_GateHeatmap": (
        {"dmp_patch": "DMP_PATCH", "model": "MODEL"},
        ["scheduler", "steps", "sites", "scale", "class_label"],
        [("image", "IMAGE")],
    ),
    "DMP_PatchInfo": ({"dmp_patch": "DMP_PATCH"}, [], [("text", "STRING")]),
    "DMP_Prompts": ({"clip": "CLIP"}, ["text", "file"], [("conditionings", "CONDITIONING")]),
    "DMP_Train": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "teacher_model": "MODEL",
            "vae": "VAE",
        },
        list(_TRAINING),
        [("dmp_patch", "DMP_PATCH"), ("loss", "IMAGE"), ("comparison", "IMAGE")],
    ),
    "DMP_Save": (
        {"dmp_patch": "DMP_PATCH", "preview": "IMAGE"},
        ["filename_prefix"],
        [("patch_name", "STRING")],
    ),
}


class Workflow:
    """A workflow in both formats; columns are laid out from left to right."""

    def __init__(self, note: str) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.api: dict[str, Any] = {}
        self.note = note
        self._bottom: dict[int, int] = {}
        self._columns: dict[int, list[dict[str, Any]]] = {}

    def add(self, kind: str, column: int, title: str | None = None, **inputs: Any) -> list[Any]:
        """A node; its first output. Links are [node, output], widgets plain values."""
        sockets, widgets, outputs = NODES[kind]
        number = len(self.nodes) + 1
        node: dict[str, Any] = {
            "id": number,
            "type": kind,
            **self._place(column, kind, max(len(sockets), len(outputs)), len(widgets)),
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [self._link(inputs.get(name), number, i, name, sockets[name])
                       for i, name in enumerate(sockets)],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in outputs],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [inputs[name] for name in widgets],
        }  # fmt: skip
        if title:
            node["title"] = title
        if "seed" in widgets:  # the browser keeps what happens to a seed as one more widget
            node["widgets_values"].insert(widgets.index("seed") + 1, "fixed")
        self.nodes.append(node)
        self._columns.setdefault(column, []).append(node)
        self.api[str(number)] = {
            "class_type": kind,
            "inputs": inputs,
            "_meta": {"title": title or kind},
        }
        return [str(number), 0]

    def bottom(self, column: int) -> int:
        """Where the next node of a column begins."""
        return self._bottom.get(column, 120)

    def move(self, column: int, top: int) -> None:
        """Moves a column, and what will be added to it, so that it begins at a height."""
        shift = top - 120
        for node in self._columns.get(column, []):
            node["pos"][1] += shift
        self._bottom[column] = self.bottom(column) + shift

    def _place(self, column: int, kind: str, slots: int, widgets: int) -> dict[str, Any]:
        more = {"DMP_Prompts": 160, "DMP_Save": 60}
        tall = {"CLIPTextEncode": 110, "SaveImage": 300, "PreviewAny": 460, **more}.get(kind, 0)
        height = 40 + 22 * slots + 26 * widgets + tall
        top = self._bottom.get(column, 120)
        self._bottom[column] = top + height + 60
        return {"pos": [40 + 380 * column, top], "size": [320, height]}

    def _link(self, source: list[Any] | None, target: int, slot: int, name: str, kind: str) -> Any:
        if source is None:  # an optional socket that the workflow leaves open
            return {"name": name, "type": kind, "link": None}
        number, (node, output) = len(self.links) + 1, source
        outputs = self.nodes[int(node) - 1]["outputs"]
        outputs[output]["links"].append(number)
        type_ = outputs[output]["type"]
        self.links.append([number, int(node), output, target, slot, type_])
        return {"name": name, "type": kind, "link": number}

    def for_browser(self) -> dict[str, Any]:
        """The format the browser loads, with the note as a node."""
        note = {
            "id": len(self.nodes) + 1,
            "type": "MarkdownNote",
            "pos": [40, -140],
            "size": [700, 190],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "title": "About this workflow",
            "widgets_values": [self.note],
        }
        return {
            "last_node_id": note["id"],
            "last_link_id": len(self.links),
            "nodes": [*self.nodes, note],
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def checkpoint(self, file: str) -> None:
        self.model = self.add("CheckpointLoaderSimple", 0, ckpt_name=file)
        number = self.model[0]
        self.clip, self.vae = [number, 1], [number, 2]

    def prompts(self, positive: str, negative: str = "") -> None:
        self.positive = self.add("CLIPTextEncode", 1, "Positive", clip=self.clip, text=positive)
        self.negative = self.add("CLIPTextEncode", 1, "Negative", clip=self.clip, text=negative)

    def latent(self, size: int, kind: str = "EmptyLatentImage") -> None:
        self.empty = self.add(kind, 0, width=size, height=size, batch_size=1)

    def picture(self, model: list[Any], prefix: str, column: int = 3, **sampling: Any) -> None:
        """Samples, decodes and saves a picture."""
        inputs = {
            "model": model,
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.empty,
            "seed": 42,
            "steps": 20,
            "cfg": 7.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            **sampling,
        }
        samples = self.add("KSampler", column, **inputs)
        pixels = self.add("VAEDecode", column, samples=samples, vae=self.vae)
        self.add("SaveImage", column + 1, prefix, images=pixels, filename_prefix=f"dmp/{prefix}")


SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
SD35 = "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors"
GARDEN = "a cat in a garden, morning light"
PROMPTS = """a cat in a garden, morning light
portrait of an old fisherman, weathered face
a red bicycle in front of a brick wall
a mountain lake at sunset, reflections
a bowl of fruit on a wooden table
a crowded street at night, neon signs, rain
a castle on a hill, oil painting
a woman in a yellow raincoat, forest"""
CHOOSE = "Choose your checkpoint and a patch for it from `models/dmp`."


def _sd15(note: str) -> Workflow:
    flow = Workflow(f"{note}\n\n{CHOOSE}")
    flow.checkpoint(SD15)
    flow.latent(512)
    flow.prompts(GARDEN, "blurry")
    return flow


def basic() -> Workflow:
    flow = _sd15("## A patched model\n\n**Load DMP Patch** reads a patch, **Apply DMP** puts it "
                 "on the model. Nothing else changes.")  # fmt: skip
    patch = flow.add("DMP_Load", 2, patch_name="sd15-patch.safetensors")
    flow.picture(flow.add("DMP_Apply", 2, model=flow.model, dmp_patch=patch), "patched")
    return flow


def compare() -> Workflow:
    flow = _sd15("## Base beside patched\n\nThe same seed through the plain and the patched model. "
                 "Applying a patch does not touch the other branch.")  # fmt: skip
    patch = flow.add("DMP_Load", 2, patch_name="sd15-patch.safetensors")
    patched = flow.add("DMP_Apply", 2, model=flow.model, dmp_patch=patch)
    flow.picture(flow.model, "base")
    flow.picture(patched, "patched")
    return flow


def curve() -> Workflow:
    flow = _sd15("## Strength along the denoising\n\n**DMP Gate Strength** multiplies the strength "
                 "by early, middle and late, linear in between. Here the patch is strong while the "
                 "composition forms, and fades out where details form.")  # fmt: skip
    patch = flow.add("DMP_Load", 2, patch_name="sd15-patch.safetensors")
    patch = flow.add("DMP_GateStrength", 2, dmp_patch=patch, **_STRENGTH)
    flow.picture(flow.add("DMP_Apply", 2, model=flow.model, dmp_patch=patch), "curve")
    return flow


def heatmap() -> Workflow:
    flow = Workflow("## What the gate does\n\nThe weights of all prompts at the steps of a "
                    f"scheduler, and what the file says about itself.\n\n{CHOOSE}")  # fmt: skip
    flow.checkpoint(SD15)
    patch = flow.add("DMP_Load", 0, patch_name="sd15-patch.safetensors")
    image = flow.add(
        "DMP_GateHeatmap",
        1,
        dmp_patch=patch,
        model=flow.model,
        scheduler="normal",
        steps=30,
        sites="first, middle, last",
        scale="per-panel",
        class_label=0,
    )
    text = flow.add("DMP_PatchInfo", 1, dmp_patch=patch)
    flow.add("SaveImage", 2, images=image, filename_prefix="dmp/heatmap")
    flow.add("PreviewAny", 3, source=text)
    return flow


def sdxl() -> Workflow:
    flow = Workflow("## SDXL\n\nFor the SDXL base and its fine-tunes. The refiner is another model "
                    f"and takes no patch.\n\n{CHOOSE}")  # fmt: skip
    flow.checkpoint("sd_xl_base_1.0.safetensors")
    flow.latent(1024)
    flow.prompts(GARDEN)
    inputs = {"patch_name": "sdxl-patch.safetensors", "strength": 1.0}
    flow.picture(flow.add("DMP_LoadApply", 2, model=flow.model, **inputs), "sdxl", steps=25)
    return flow


def sd35() -> Workflow:
    flow = Workflow("## A diffusion transformer\n\nSD 3.5; the same nodes serve SD 3, Flux and "
                    f"PixArt.\n\n{CHOOSE}")  # fmt: skip
    flow.checkpoint(SD35)
    flow.latent(1024, "EmptySD3LatentImage")
    flow.prompts(GARDEN)
    inputs = {"patch_name": "sd35-patch.safetensors", "strength": 1.0}
    model = flow.add("DMP_LoadApply", 2, model=flow.model, **inputs)
    flow.picture(model, "sd35", steps=28, cfg=4.5, scheduler="sgm_uniform")
    return flow


def stacked() -> Workflow:
    flow = _sd15("## Two patches\n\nWhat they add is summed; the order does not matter. Give each "
                 "its own strength.")  # fmt: skip
    inputs = {"patch_name": "sd15-patch.safetensors", "strength": 0.8}
    model = flow.add("DMP_LoadApply", 2, model=flow.model, **inputs)
    inputs = {"patch_name": "sd15-other.safetensors", "strength": 0.5}
    flow.picture(flow.add("DMP_LoadApply", 2, model=model, **inputs), "stacked")
    return flow


def repair() -> Workflow:
    flow = Workflow("## A quantised model, repaired\n\nThe same seed through the full model, the "
                    "model in Q4_0, and that one with a repair patch, which was trained to bring "
                    "it back to the full model. The quantised weights stay as they are. Put the "
                    "repair patch on the file that it was made for: **DMP Patch Info** says which. "
                    "Needs ComfyUI-GGUF.\n\nChoose your files.")  # fmt: skip
    flow.checkpoint(SD35)
    flow.latent(1024, "EmptySD3LatentImage")
    flow.prompts(GARDEN)
    few = flow.add("UnetLoaderGGUF", 1, unet_name="sd3.5_medium-Q4_0.gguf")
    inputs = {"patch_name": "sd35-repair-q4_0.safetensors", "strength": 1.0}
    repaired = flow.add("DMP_LoadApply", 2, model=few, **inputs)
    sampling = {"steps": 28, "cfg": 4.5, "scheduler": "sgm_uniform"}
    flow.picture(flow.model, "full", **sampling)
    flow.picture(few, "q4", **sampling)
    flow.picture(repaired, "repaired", column=5, **sampling)
    return flow


def one_call() -> Workflow:
    flow = _sd15("## Half the time: no second call\n\nAbove, the plain model with guidance: two "
                 "calls of the model a step. Below, a guidance patch at CFG 1: one call. Its "
                 "strength takes the place of CFG; 0 is no guidance.")  # fmt: skip
    inputs = {"patch_name": "sd15-guidance.safetensors", "strength": 1.0}
    guided = flow.add("DMP_LoadApply", 2, model=flow.model, **inputs)
    flow.picture(flow.model, "two-calls")
    flow.picture(guided, "one-call", cfg=1.0)
    return flow


def _trained(flow: Workflow, prefix: str, **training: Any) -> None:
    """Trains a patch, saves it, and shows what it did.

    The prompts stand above the wires from the loaders, so that none runs behind a node.
    """
    below = flow.bottom(1) + 40
    flow.move(0, below)
    flow.move(2, below)
    given = {**_TRAINING, "negative": flow.negative, "vae": flow.vae}
    patch = flow.add("DMP_Train", 2, **{**given, **training})
    loss, beside = [patch[0], 1], [patch[0], 2]
    flow.move(3, below - 420)
    flow.add("DMP_Save", 3, dmp_patch=patch, preview=beside, filename_prefix=prefix)
    flow.add("SaveImage", 3, "Loss", images=loss, filename_prefix="dmp/loss")
    flow.add("SaveImage", 3, "Side by side", images=beside, filename_prefix="dmp/side-by-side")


def _prompted(flow: Workflow, negative: str) -> list[Any]:
    """The prompts of a training; their list."""
    flow.negative = flow.add("CLIPTextEncode", 1, "Negative", clip=flow.clip, text=negative)
    return flow.add("DMP_Prompts", 1, clip=flow.clip, text=PROMPTS, file="None")


def train_repair() -> Workflow:
    flow = Workflow("## Repair your GGUF model\n\nChoose the full model and its quantised file. "
                    "**Train DMP Patch** lets the full model draw from the prompts, and trains a "
                    "patch with which the quantised one predicts the same. It needs no pictures. "
                    "Stop it when the curve is flat: what is trained so far is saved to "
                    "`models/dmp`. *Side by side* shows all three from noise that was not trained "
                    "on; use the patch with the workflow `dmp-repair-quantised`. Needs "
                    "ComfyUI-GGUF.")  # fmt: skip
    flow.checkpoint(SD35)
    few = flow.add("UnetLoaderGGUF", 0, unet_name="sd3.5_medium-Q4_0.gguf")
    listed = _prompted(flow, "")
    facts = {"cfg": 4.5, "scheduler": "sgm_uniform", "width": 768, "height": 768}
    models = {"model": few, "teacher_model": flow.model}
    _trained(flow, "repair/sd35-q4_0", positive=listed, **models, **facts)
    return flow


def train_guidance() -> Workflow:
    flow = Workflow("## Make your checkpoint twice as fast\n\n**Train DMP Patch** trains a patch "
                    "that predicts with one call of the model a step what CFG needs two for. It "
                    "needs no pictures, only prompts like those that you will use. Stop it when "
                    "the curve is flat: what is trained so far is saved to `models/dmp`. *Side by "
                    "side* shows CFG, the model without and with the patch, with the seconds of "
                    "each; use the patch with the workflow `dmp-one-call`.")  # fmt: skip
    flow.checkpoint(SD15)
    listed = _prompted(flow, "blurry")
    _trained(flow, "guidance/sd15", positive=listed, model=flow.model, objective="guidance")
    return flow


WORKFLOWS: dict[str, Callable[[], Workflow]] = {
    "dmp-basic-sd15": basic,
    "dmp-compare": compare,
    "dmp-strength-curve": curve,
    "dmp-gate-heatmap": heatmap,
    "dmp-sdxl": sdxl,
    "dmp-sd35": sd35,
    "dmp-stacked": stacked,
    "dmp-repair-quantised": repair,
    "dmp-one-call": one_call,
    "dmp-train-repair": train_repair,
    "dmp-train-guidance": train_guidance,
}


def files() -> dict[Path, str]:
    """The text of every file."""
    made: dict[Path, str] = {}
    for name, make in WORKFLOWS.items():
        flow = make()
        made[FOLDER / f"{name}.json"] = json.dumps(flow.for_browser(), indent=1) + "\n"
        made[FOLDER / "api" / f"{name}.json"] = json.dumps(flow.api, indent=1) + "\n"
    return made


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
