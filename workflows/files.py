"""The files that the workflows name, and where to get or make each."""

from __future__ import annotations

from typing import Any

SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
SDXL = "sd_xl_base_1.0.safetensors"
SD35 = "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors"
SD35_Q4 = "sd3.5_medium-Q4_0.gguf"

_HUB = "https://huggingface.co"
# Folder of models, what else serves, and where it is.
MODELS = {
    SD15: (
        "checkpoints",
        "any other SD 1.5",
        f"{_HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{SD15}",
    ),
    SDXL: (
        "checkpoints",
        "any other SDXL",
        f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{SDXL}",
    ),
    SD35: (
        "checkpoints",
        "any other SD 3.5 medium",
        f"{_HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/{SD35}",
    ),
    SD35_Q4: (
        "unet",
        "another file in few bits of the same model",
        f"{_HUB}/city96/stable-diffusion-3.5-medium-gguf/resolve/main/{SD35_Q4}",
    ),
}
_ANY = "the template **dmp-train-guidance** makes one that needs one call a step"
# Patches: how to make one. None for the large models is published.
PATCHES = {
    "sd15-patch.safetensors": _ANY,
    "sd15-other.safetensors": "a second patch for the same model",
    "sdxl-patch.safetensors": f"{_ANY}: choose your SDXL checkpoint there",
    "sd35-patch.safetensors": f"{_ANY}: choose your SD 3.5 checkpoint there",
    "sd15-guidance.safetensors": "the template **dmp-train-guidance** makes it",
    "sd35-repair-q4_0.safetensors": "the template **dmp-train-repair** makes it",
}
PACKS = {
    "UnetLoaderGGUF": "The loader of GGUF files is in the pack "
    "[ComfyUI-GGUF](https://github.com/city96/ComfyUI-GGUF): install it with the manager.",
    "ImageCompare": "**Compare Images** is in ComfyUI since 0.9; its slider needs *Nodes 2.0*, "
    "which is in ComfyUI's menu. In ComfyUI 0.8 the node is red: delete it. The pictures are "
    "saved in either case.",
}


def named(inputs: dict[str, Any]) -> list[str]:
    """Returns the files that the inputs of a node name."""
    values = (value for value in inputs.values() if isinstance(value, str))
    return [value for value in values if value in MODELS or value in PATCHES]


def where_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the property by which ComfyUI's dialog of missing models offers a download."""
    models = [
        {"name": name, "url": MODELS[name][2], "directory": MODELS[name][0]}
        for name in named(inputs)
        if name in MODELS
    ]
    return {"models": models} if models else {}


def remarks(api: dict[str, Any]) -> str:
    """Returns the end of a note: the files and packs that a workflow needs.

    Args:
        api: the workflow in API format.
    """
    names = dict.fromkeys(name for node in api.values() for name in named(node["inputs"]))
    lines = ["**Files**; choose yours in the nodes, press R after adding one:", ""]
    for name in names:
        if name in MODELS:
            folder, other, url = MODELS[name]
            lines.append(f"- **models/{folder}**: [{name}]({url}), or {other}")
        else:
            lines.append(
                f"- **models/dmp**: **{name}** stands for a patch of yours: {PATCHES[name]}"
            )
    kinds = dict.fromkeys(node["class_type"] for node in api.values())
    lines += [f"\n{PACKS[kind]}" for kind in kinds if kind in PACKS]
    return "\n".join(lines)
