"""Features of images, which distances between sets of images are measured in."""

from __future__ import annotations

import hashlib
import importlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmp_common import PatchError
from training.objective.digit_classifier import DigitClassifier, load_digit_classifier

# Of torch-fidelity's weights-inception-2015-12-05-6726825d.pth, the network FID is defined by.
INCEPTION_SHA256 = "6726825d"
_SPATIAL = "Mixed_6d.branch1x1"  # "mixed_6/conv" in the graph of 2015
_SPATIAL_CHANNELS = 7
# torchvision without its operators raises the latter.
_MAY_BE_MISSING = (ImportError, RuntimeError)


@dataclass(frozen=True)
class Features:
    """Features of N images, float32 on the CPU.

    Args:
        pooled: (N, F).
        spatial: (N, G), for sFID; None where the extractor has none.
    """

    pooled: Tensor
    spatial: Tensor | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.pooled)

    @staticmethod
    def joined(parts: list[Features]) -> Features:
        """The features of several batches."""
        spatial = [part.spatial for part in parts if part.spatial is not None]
        return Features(
            torch.cat([part.pooled for part in parts]), torch.cat(spatial) if spatial else None
        )


class Extractor:
    """From images to features.

    Args:
        name: for the report.
        module: takes images (B, C, H, W) in [-1, 1]; gives (B, F), or a pair of that and a feature
            map (B, D, h, w) that sFID is measured on.
        device: where it works.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device | str = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        self.module = module.to(self.device).eval()

    def __call__(self, images: Tensor) -> Features:
        """Features of images (B, C, H, W) in [-1, 1]; those of videos (B, C, frames, H, W) are
        their frames', side by side, without a map.

        Raises:
            PatchError: the module gives something else than it should, or does not take them.
        """
        if images.ndim == 5:
            frames = self(images.transpose(1, 2).flatten(0, 1)).pooled
            return Features(frames.reshape(len(images), -1))
        try:
            with torch.no_grad():
                found = self.module(images.to(self.device))
        except (ValueError, RuntimeError) as error:
            raise PatchError(
                f"expected a feature extractor that takes images {tuple(images.shape)} in "
                f"[-1, 1], found {self.name}: {' '.join(str(error).split())[:200]}: choose another "
                "with --feature_extractor or --inception_weights."
            ) from error
        pooled, feature_map = found if isinstance(found, tuple) else (found, None)
        fits = isinstance(pooled, Tensor) and pooled.ndim == 2 and len(pooled) == len(images)
        if not fits or (feature_map is not None and feature_map.ndim != 4):
            shape = getattr(pooled, "shape", type(pooled).__name__)
            raise PatchError(
                f"expected features ({len(images)}, F), or a pair of these and a map (B, D, h, w), "
                f"from feature extractor {self.name}, found {shape}: change the extractor."
            )
        spatial = None if feature_map is None else spatial_features(feature_map).float().cpu()
        return Features(pooled.float().cpu(), spatial)


def spatial_features(feature_map: Tensor) -> Tensor:
    """What sFID is measured on: the first seven channels of a map (B, D, h, w), flattened.

    Of Inception's 17 x 17 map these are 2023 values.

    Source: Nash et al. 2021, section 5; the evaluator of Dhariwal and Nichol 2021.
    """
    return feature_map[:, :_SPATIAL_CHANNELS].flatten(1)


class Inception(nn.Module):
    """The Inception of FID, as torch-fidelity ports it: 2048 pooled features, and sFID's map.

    Args:
        weights: file with its weights; nothing is ever downloaded.
        sha256: first digits, at least eight, of the hash the file must have.

    Raises:
        PatchError: torch-fidelity is missing, or the file is not the one asked for.
    """

    def __init__(self, weights: Path, sha256: str = INCEPTION_SHA256) -> None:
        super().__init__()
        state = _checked_weights(weights, sha256)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except _MAY_BE_MISSING as error:
            raise PatchError(
                "expected the package torch-fidelity for Inception features, found none that "
                f"works ({' '.join(str(error).split())[:120]}): pip install torch-fidelity, or "
                "give another --feature_extractor."
            ) from error
        # torch-fidelity unpickles whatever it is given, so it gets what we have read safely.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], buffer)
        except RuntimeError as error:
            raise PatchError(
                f"expected Inception's weights as torch-fidelity publishes them in {weights}, "
                f"found others: {' '.join(str(error).split())[:200]}: get that file."
            ) from error
        self._map: list[Tensor] = []
        layer = self.network.get_submodule(_SPATIAL)
        layer.register_forward_hook(lambda module, args, output: self._map.append(output))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, 2048) and the map (B, 192, 17, 17) of images (B, 1 or 3, H, W)."""
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        self._map.clear()
        (pooled,) = self.network(levels.expand(-1, 3, -1, -1))
        return pooled, self._map.pop()


def _checked_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    if len(sha256) < 8 or set(sha256.lower()) - set("0123456789abcdef"):
        raise PatchError(
            f"expected at least eight hex digits as --inception_sha256, found {sha256!r}: give "
            "the beginning of the file's sha256."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PatchError(
            f"expected Inception's weights at {path}, found {error.strerror}: check "
            "--inception_weights."
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(sha256.lower()):
        raise PatchError(
            f"expected a file whose sha256 begins with {sha256.lower()} as --inception_weights, "
            f"found {found} in {path}: get weights-inception-2015-12-05-6726825d.pth from the "
            "releases of torch-fidelity, or name the hash of yours with --inception_sha256."
        )
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError) as error:
        raise _no_weights(path, error) from error
    if not isinstance(state, dict):
        raise _no_weights(path, type(state).__name__)
    return state


def _no_weights(path: Path, found: object) -> PatchError:
    text = " ".join(str(found).split())[:120]
    return PatchError(f"expected a dictionary of tensors in {path}, found {text}: get the file.")


def load_extractor(
    base: str,
    *,
    inception_weights: str | None = None,
    inception_sha256: str = INCEPTION_SHA256,
    chosen: str | None = None,
    device: torch.device | str = "cpu",
) -> Extractor | None:
    """The extractor that options ask for; for base digits, without any, its classifier.

    Args:
        base: name of the base.
        chosen: a TorchScript file, or package.module:function that returns a module.

    Returns:
        None where nothing is named and the base has no extractor of its own.

    Raises:
        PatchError: two are named, or what is named is none.
    """
    if inception_weights is not None and chosen is not None:
        raise PatchError(
            "expected one feature extractor, found --inception_weights and --feature_extractor: "
            "leave one out."
        )
    if inception_weights is not None:
        module = Inception(Path(inception_weights), inception_sha256)
        return Extractor("Inception", module, device)
    if chosen is not None:
        return Extractor(chosen, _named(chosen, "--feature_extractor"), device)
    if base != "digits":
        return None
    return Extractor("classifier of the digits", _Classifier(load_digit_classifier()), device)


def load_classifier(base: str, chosen: str | None, device: torch.device) -> nn.Module | None:
    """The classifier of the class accuracy, from images (B, C, H, W) in [-1, 1] to logits; for base
    digits, without any, its own.

    Args:
        base, chosen: see `load_extractor`.

    Returns:
        None where nothing is named and the base has no classifier of its own.

    Raises:
        PatchError: what is named is none.
    """
    if chosen is not None:
        return _named(chosen, "--classifier").to(device).eval()
    return load_digit_classifier().to(device) if base == "digits" else None


class _Classifier(nn.Module):
    """The features of the bundled classifier."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


def _named(chosen: str, option: str) -> nn.Module:
    """A module from a TorchScript file, or from a function that makes it."""
    if Path(chosen).is_file():
        try:
            return torch.jit.load(chosen, map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise PatchError(
                f"expected a TorchScript file at {chosen}, found {str(error).splitlines()[0][:120]}"
                ": save it with torch.jit.save, or name package.module:function."
            ) from error
    name, colon, function = chosen.partition(":")
    if not colon:
        raise PatchError(
            f"expected a TorchScript file or package.module:function as {option}, found "
            f"{chosen!r}: check the path."
        )
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise PatchError(
            f"expected a function {function} in module {name} for {option}, found "
            f"{error}: check both names, and that the module is on PYTHONPATH."
        ) from error
    module = make()
    if not isinstance(module, nn.Module):
        raise PatchError(
            f"expected {chosen} to return a torch.nn.Module, found {type(module).__name__}: "
            "change the function."
        )
    return module
