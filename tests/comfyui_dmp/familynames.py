"""The names of the families of `real.py`, which imports ComfyUI, for the parameters of tests."""

from __future__ import annotations

NAMES = [
    *("sd15", "sdxl", "sd3", "sd35", "flux", "pixart", "qwen-image", "lumina2", "z-image"),
    *("flux2", "chroma", "ernie-image", "krea2", "anima", "wan", "wan22"),
    *("auraflow", "hunyuan-image"),
]
