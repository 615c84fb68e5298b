"""The public interface, assembled here so that the folders below need not know each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmp_common.attach.attachment import Attachment, attach, attached, detach
from dmp_common.attach.context import Context
from dmp_common.attach.field import FieldCache
from dmp_common.attach.runtime import Runtime
from dmp_common.attach.settings import Settings
from dmp_common.bases.base import Base
from dmp_common.bases.detect import detect_base
from dmp_common.bases.parts import Latent, Site
from dmp_common.bases.schedule import Schedule
from dmp_common.bases.table import get_base, known_bases, register_base
from dmp_common.errors import PatchError
from dmp_common.patch import patch as core
from dmp_common.patch.balancing import importance_loss, load_loss
from dmp_common.patch.choices import Mix
from dmp_common.patch.file import PatchContents, modelspec, read_patch_file, write_patch_file
from dmp_common.patch.variant import Variant

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Attachment",
    "Base",
    "Context",
    "Patch",
    "PatchError",
    "Schedule",
    "Settings",
    "Site",
    "Variant",
    "attach",
    "attached",
    "detach",
    "detect_base",
    "get_base",
    "importance_loss",
    "known_bases",
    "load_loss",
    "register_base",
]


class Patch(core.Patch):
    """Learnable prompts for the sites of a base, weighted by a gate that sees the timestep.

    Fields are cached between calls in evaluation mode (`Patch.load` returns a patch in it) and
    without gradients. The cache notices when a parameter is changed in place, but not writes
    through `.data`: call `cache.clear()` after them.

    Args:
        variant: the configuration of the patch.

    Attributes:
        runtime: what the patch needs in forward calls; all models that it is attached to share it.

    Source: Ham et al. 2025, "Diffusion Model Patching via Mixture-of-Prompts".
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant)
        self.runtime = Runtime(self)

    @classmethod
    def load(cls, source: str | os.PathLike[str], **hub_options: Any) -> Self:
        """Loads a patch from a file, or from a repository "user/repo" of the hub.

        Args:
            source: a path, or a repository "user/repo".
            hub_options: options of `huggingface_hub.hf_hub_download`, see
                `dmp_common.tools.hub.resolve`.

        Returns:
            The patch: float32, on the CPU, in evaluation mode.

        Raises:
            PatchError: the file is not a patch or is damaged; the message names the file, what was
                expected, what was found and what to do.
        """
        from dmp_common.tools.hub import resolve  # imported here, because few callers need it

        return cls.of(read_patch_file(resolve(source, **hub_options)))

    @classmethod
    def of(cls, contents: PatchContents) -> Self:
        """Makes a patch from the contents of a file: float32, on the CPU, in evaluation mode."""
        with torch.device("meta"):
            patch = cls(contents.variant)
        patch.to_empty(device="cpu")
        patch.load_tensors(contents.tensors)  # this copies the values out of the file's memory
        patch.metadata = contents.metadata
        return patch.eval()

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> str:
        """Writes the patch to a file, atomically.

        Args:
            path: the file, which must end in `.safetensors`; a missing folder is made.
            metadata: header entries besides ours, such as `ss_*` keys.
            dtype: the type of the stored values: float32, float16 or bfloat16.

        Returns:
            The file's hash (10 hex digits), as hosts show it.

        Raises:
            PatchError: the path has another ending, a value is not finite, or metadata is not text.
        """
        made = {**self.metadata, **modelspec(self.variant, Path(path)), **(metadata or {})}
        return write_patch_file(path, self.variant, self.tensors(), made, dtype)

    def prepare(
        self,
        e: Tensor,
        latent_hw: tuple[int, int] | None,
        settings: Settings | None = None,
        *,
        timesteps: Tensor | None = None,
        image_tokens: int | None = None,
        text_tokens: int | tuple[int, ...] | None = None,
        frames: int = 1,
    ) -> Context:
        """Computes what one forward call of a model will add: all gates at once, in float32.

        `attach` calls this itself. Call it only in an adapter for another host.

        Args:
            e: the model's time embedding of each batch item (B, E).
            latent_hw: height and width of the latent; may be None for UNets.
            settings: strength, schedule and other settings.
            timesteps: (B,) on the scale 0..1000; needed if `needs_timesteps` returns True.
            image_tokens, text_tokens, frames: see `Latent`.

        Returns:
            An immutable context; call `context.add(site, x)` at each site.

        Raises:
            PatchError: the embedding is of another base, a site is unknown, or the timesteps are
                missing.
        """
        latent = None
        if latent_hw is not None:
            latent = Latent(len(e), latent_hw, image_tokens, text_tokens, frames)
        return self.runtime.prepare(e, latent, settings or Settings(), timesteps=timesteps)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the patch with a model card to a repository "user/repo" of the hub.

        Args:
            repo_id: the repository "user/repo", which is made if it does not exist.
            options: token, private, license and others, see `dmp_common.tools.publish.push_to_hub`.

        Returns:
            The repository's address.

        Raises:
            PatchError: there is no hub client, no connection, or no permission.
        """
        from dmp_common.tools.publish import push_to_hub  # imported here: few callers need it

        return push_to_hub(self, repo_id, **options)

    @property
    def cache(self) -> FieldCache:
        """The cache of fields between forward calls; its `limit` in bytes may be set."""
        return self.runtime.cache

    def needs_timesteps(self, settings: Settings) -> bool:
        """Tells whether the strength of the patch differs between timesteps."""
        return self.runtime.needs_timesteps(settings)

    def strengths(self, settings: Settings, timesteps: Tensor | None) -> float | Tensor:
        """Returns the strength of each batch item, 0 outside the patch's own timesteps."""
        return self.runtime.strengths(settings, timesteps)

    def on(self, device: torch.device) -> core.Patch:
        """Returns the patch on a device: itself, or a copy that follows changes of parameters.

        Raises:
            PatchError: the patch is being trained elsewhere.
        """
        return self.runtime.on(device).patch

    def release(self) -> None:
        """Frees the memory of copies on other devices and of cached fields."""
        self.runtime.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = super().__deepcopy__(memo)
        other.cache.limit = self.cache.limit
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        state["runtime"] = self.cache.limit
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        limit = state.pop("runtime")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.runtime = Runtime(self)
        self.cache.limit = limit


def convert_official(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    base: str | Base | None = None,
    mix: Mix | None = None,
) -> Patch:
    """Imports a checkpoint of the official code, and saves the patch if a target is given.

    Args:
        source: the checkpoint.
        target: the patch file to write.
        base, mix: needed if the file does not show them, see `dmp_common.tools.convert`.

    Raises:
        PatchError: see `dmp_common.tools.convert.read_official`.
    """
    from dmp_common.tools.convert import read_official  # nothing else needs it

    patch = Patch.of(read_official(source, base=base, mix=mix))
    if target is not None:
        patch.save(target)
    return patch
