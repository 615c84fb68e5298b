"""The parts of a base before their weights are read."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from training.base.loading import Loader


class Blueprint(Loader):
    """The same parts from their configurations alone, without memory for their weights.

    What a base needs of its data is known from them, before gigabytes are read.
    """

    def denoiser(self) -> Any:
        """Returns the denoiser on the meta device."""
        config = self.denoiser_config()
        with torch.device("meta"):
            return self._denoiser.from_config(config)

    def vae(self) -> Any:
        """Returns the VAE on the meta device."""
        config = self.vae_config()
        cls: Any = getattr(diffusers, self.family.autoencoder)
        with torch.device("meta"):
            return cls.from_config(config)

    def scheduler(self) -> Any:
        """Returns nothing: the schedule says nothing about the data."""

    def vision(self) -> dict[str, Any]:
        """Returns nothing: what looks at a picture does not matter to the data."""
        return {}

    def encoders(self) -> dict[str, nn.Module]:
        """Returns nothing: what they are does not matter to the data."""
        return {}
