"""The nodes that the workflows use; a test compares the tables with ComfyUI's own."""

from __future__ import annotations

from typing import Any

Node = tuple[dict[str, str], list[str], list[tuple[str, str]]]

# Values that a workflow need not name. A socket that may stay open is None.
DEFAULTS: dict[str, dict[str, Any]] = {
    "DMP_Apply": {"keyframes": ""},
    "DMP_LoadApply": {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0},
    "DMP_Stack": {
        f"{name}_{row}": value
        for row in range(1, 5)
        for name, value in (("on", True), ("patch", "None"), ("strength", 1.0))
    },
    "DMP_GateStrength": {
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "early": 1.0,
        "middle": 1.0,
        "late": 1.0,
        "temperature": 1.0,
        "sites": "all",
        "site_strengths": "",
        "keyframes": "",
    },
    "DMP_GateHeatmap": {
        "scheduler": "normal",
        "steps": 30,
        "sites": "first, middle, last",
        "scale": "per-panel",
        "class_label": 0,
    },
    "DMP_Train": {
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
        "gradient_checkpointing": True,
        "expert": "auto",
        "length": 1,
    },
    "KSampler": {
        "seed": 42,
        "steps": 20,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    },
    "ConditioningSetPropertiesAndCombine": {"strength": 1.0, "set_cond_area": "default"},
    "ImageCompare": {"compare_view": ""},
}

_SAMPLER = {
    "model": "MODEL",
    "positive": "CONDITIONING",
    "negative": "CONDITIONING",
    "latent_image": "LATENT",
}
# Sockets, widgets and outputs.
NODES: dict[str, Node] = {
    "CheckpointLoaderSimple": (
        {},
        ["ckpt_name"],
        [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")],
    ),
    "UnetLoaderGGUF": ({}, ["unet_name"], [("MODEL", "MODEL")]),  # of ComfyUI-GGUF
    "CLIPTextEncode": ({"clip": "CLIP"}, ["text"], [("CONDITIONING", "CONDITIONING")]),
    "ConditioningSetArea": (
        {"conditioning": "CONDITIONING"},
        ["width", "height", "x", "y", "strength"],
        [("CONDITIONING", "CONDITIONING")],
    ),
    "ConditioningSetPropertiesAndCombine": (
        {
            "cond": "CONDITIONING",
            "cond_NEW": "CONDITIONING",
            "mask": "MASK",
            "hooks": "HOOKS",
            "timesteps": "TIMESTEPS_RANGE",
        },
        ["strength", "set_cond_area"],
        [("CONDITIONING", "CONDITIONING")],
    ),
    "CreateHookKeyframe": (
        {"prev_hook_kf": "HOOK_KEYFRAMES"},
        ["strength_mult", "start_percent"],
        [("HOOK_KF", "HOOK_KEYFRAMES")],
    ),
    "SetHookKeyframes": ({"hooks": "HOOKS", "hook_kf": "HOOK_KEYFRAMES"}, [], [("HOOKS", "HOOKS")]),
    "SolidMask": ({}, ["value", "width", "height"], [("MASK", "MASK")]),
    "MaskComposite": (
        {"destination": "MASK", "source": "MASK"},
        ["x", "y", "operation"],
        [("MASK", "MASK")],
    ),
    "InvertMask": ({"mask": "MASK"}, [], [("MASK", "MASK")]),
    "EmptyLatentImage": ({}, ["width", "height", "batch_size"], [("LATENT", "LATENT")]),
    "EmptySD3LatentImage": ({}, ["width", "height", "batch_size"], [("LATENT", "LATENT")]),
    "KSampler": (
        _SAMPLER,
        ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        [("LATENT", "LATENT")],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, [], [("IMAGE", "IMAGE")]),
    "SaveImage": ({"images": "IMAGE"}, ["filename_prefix"], []),
    "ImageFromBatch": ({"image": "IMAGE"}, ["batch_index", "length"], [("IMAGE", "IMAGE")]),
    "ImageCompare": ({"image_a": "IMAGE", "image_b": "IMAGE"}, [], []),  # not in 0.8
    "PreviewAny": ({"source": "*"}, [], []),
    "DMP_Load": ({}, ["patch_name"], [("dmp_patch", "DMP_PATCH")]),
    "DMP_Apply": (
        {"model": "MODEL", "dmp_patch": "DMP_PATCH", "mask": "MASK"},
        ["keyframes"],
        [("model", "MODEL")],
    ),
    "DMP_LoadApply": (
        {"model": "MODEL"},
        ["patch_name", *DEFAULTS["DMP_LoadApply"]],
        [("model", "MODEL")],
    ),
    "DMP_Stack": ({"model": "MODEL"}, list(DEFAULTS["DMP_Stack"]), [("model", "MODEL")]),
    "DMP_GateStrength": (
        {"dmp_patch": "DMP_PATCH", "mask": "MASK"},
        list(DEFAULTS["DMP_GateStrength"]),
        [("dmp_patch", "DMP_PATCH")],
    ),
    "DMP_CreateHook": (
        {"dmp_patch": "DMP_PATCH", "prev_hooks": "HOOKS"},
        [],
        [("hooks", "HOOKS")],
    ),
    "DMP_GateHeatmap": (
        {"dmp_patch": "DMP_PATCH", "model": "MODEL"},
        list(DEFAULTS["DMP_GateHeatmap"]),
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
        list(DEFAULTS["DMP_Train"]),
        [
            ("dmp_patch", "DMP_PATCH"),
            ("loss", "IMAGE"),
            ("comparison", "IMAGE"),
            ("pictures", "IMAGE"),
        ],
    ),
    "DMP_Save": (
        {"dmp_patch": "DMP_PATCH", "preview": "IMAGE"},
        ["filename_prefix"],
        [("patch_name", "STRING")],
    ),
}

OTHER_PACKS = {"UnetLoaderGGUF"}  # of ComfyUI-GGUF
NEWER = {"ImageCompare"}  # nodes that ComfyUI 0.8 does not have

# Pixels that a node needs beside its rows: texts, pictures, buttons.
_MORE = {
    "CLIPTextEncode": 110,
    "SaveImage": 300,
    "PreviewAny": 460,
    "DMP_Prompts": 160,
    "DMP_Save": 60,
    "DMP_Train": 220,  # the curve, from the first steps on
    "DMP_Stack": 24,
    "DMP_GateStrength": 26,
    "DMP_GateHeatmap": 12,
    "ImageCompare": 306,
}


def height_of(kind: str) -> int:
    """Returns the height of a node in pixels, without its title, in both kinds of its drawing."""
    sockets, widgets, outputs = NODES[kind]
    rows = 22 * max(len(sockets), len(outputs)) + 26 * len(widgets)
    return 40 + rows + _MORE.get(kind, 0)
