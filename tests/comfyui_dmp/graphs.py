"""Workflows in API format, built from parts."""

from __future__ import annotations

from typing import Any


class Graph:
    """A workflow; nodes are added in order and refer to each other by name.

    Args:
        checkpoint: name of an SD 1.5 checkpoint.
        size: width and height of the picture in pixels.
        sampling: inputs of the KSampler that differ.
    """

    def __init__(
        self, checkpoint: str, size: tuple[int, int] = (64, 64), batch: int = 1, **sampling: Any
    ) -> None:
        self.sampling = {
            "seed": 1,
            "steps": 2,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            **sampling,
        }
        width, height = size
        self.nodes: dict[str, Any] = {}
        self.add("checkpoint", "CheckpointLoaderSimple", ckpt_name=checkpoint)
        self.add("positive", "CLIPTextEncode", text="a cat in the garden", clip=["checkpoint", 1])
        self.add("negative", "CLIPTextEncode", text="", clip=["checkpoint", 1])
        self.add("latent", "EmptyLatentImage", width=width, height=height, batch_size=batch)
        self.plain = ["checkpoint", 0]

    def add(self, name: str, kind: str, **inputs: Any) -> list[Any]:
        """A node; its first output."""
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    def load(self, file: str) -> list[Any]:
        """A patch file."""
        return self.add(f"load {file}", "DMP_Load", patch_name=file)

    def patched(self, model: list[Any], file: str, name: str | None = None) -> list[Any]:
        """A model with a patch."""
        name = name or f"apply {file} {model[0]}"
        return self.add(name, "DMP_Apply", model=model, dmp_patch=self.load(file))

    def strength(self, patch: list[Any], **settings: Any) -> list[Any]:
        """A patch with other settings."""
        defaults = {
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "early": 1.0,
            "middle": 1.0,
            "late": 1.0,
            "temperature": 1.0,
            "sites": "all",
        }
        name = f"strength {patch[0]} {settings}"
        return self.add(name, "DMP_GateStrength", dmp_patch=patch, **{**defaults, **settings})

    def picture(self, name: str, model: list[Any], **sampling: Any) -> None:
        """Samples a model and saves the picture under a name."""
        inputs: dict[str, Any] = {
            "latent_image": ["latent", 0],
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            **self.sampling,
            **sampling,
        }
        latent = self.add(f"{name} sampler", "KSampler", model=model, **inputs)
        pixels = self.add(f"{name} vae", "VAEDecode", samples=latent, vae=["checkpoint", 2])
        self.add(name, "SaveImage", images=pixels, filename_prefix=f"dmp/{name}")
