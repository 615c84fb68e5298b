"""Workflows in API format, built from parts."""

from __future__ import annotations

from typing import Any


class Graph:
    """A workflow; nodes are added in order and refer to each other by name.

    Args:
        checkpoint: name of a checkpoint; None for a graph that brings its own model.
        size: width and height of the picture in pixels.
        sampling: inputs of the KSampler that differ.
    """

    def __init__(
        self,
        checkpoint: str | None,
        size: tuple[int, int] = (64, 64),
        batch: int = 1,
        **sampling: Any,
    ) -> None:
        self.sampling = {
            "seed": 1,
            "steps": 2,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "latent_image": ["latent", 0],
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            **sampling,
        }
        self.nodes: dict[str, Any] = {}
        self.vae: list[Any] | None = None
        self.plain: list[Any] = ["checkpoint", 0]
        if checkpoint is None:
            return
        self.vae = ["checkpoint", 2]
        width, height = size
        self.add("checkpoint", "CheckpointLoaderSimple", ckpt_name=checkpoint)
        self.text("positive", "a cat in the garden")
        self.text("negative", "")
        self.add("latent", "EmptyLatentImage", width=width, height=height, batch_size=batch)

    @classmethod
    def of_transformer(
        cls,
        file: str,
        *,
        channels: int,
        pooled: int,
        dtype: str = "default",
        size: tuple[int, int] = (64, 96),
        **sampling: Any,
    ) -> Graph:
        """A workflow with a transformer alone; it gives latents."""
        graph = cls(None, scheduler="simple", **sampling)
        graph.plain = graph.add("model", "UNETLoader", unet_name=file, weight_dtype=dtype)
        latent = "EmptySD3LatentImage" if channels == 16 else "EmptyLatentImage"
        graph.add("latent", latent, width=size[0], height=size[1], batch_size=1)
        sizes = {"width": 4096, "pooled": pooled}
        graph.add("positive", "DMPTest_RandomConditioning", seed=1, tokens=9, **sizes)
        graph.add("negative", "DMPTest_RandomConditioning", seed=2, tokens=5, **sizes)
        return graph

    def add(self, name: str, kind: str, **inputs: Any) -> list[Any]:
        """A node; its first output."""
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    def text(self, name: str, text: str) -> list[Any]:
        """A caption."""
        return self.add(name, "CLIPTextEncode", text=text, clip=["checkpoint", 1])

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
        """Samples a model and saves the picture, or without a VAE the latent, under a name."""
        inputs = {**self.sampling, **sampling}
        latent = self.add(f"{name} sampler", "KSampler", model=model, **inputs)
        if self.vae is None:
            self.add(name, "SaveLatent", samples=latent, filename_prefix=f"dmp/{name}")
            return
        pixels = self.add(f"{name} vae", "VAEDecode", samples=latent, vae=self.vae)
        self.add(name, "SaveImage", images=pixels, filename_prefix=f"dmp/{name}")
