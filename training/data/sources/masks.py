"""Mask images beside a folder of images, as kohya's `conditioning_data_dir` has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dmp_common import PatchError
from training.data.sources.found import Found
from training.data.sources.listing import list_images


@dataclass
class Masks:
    """The masks of a folder: each has the name of its image, with any ending.

    Args:
        folder: of the masks.
        images: folder of the images; a mask may lie in a folder of the same name, or at the top.
        found: gets a problem for every image without a mask, or counts it.
    """

    folder: Path
    images: Path
    found: Found
    _known: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path | None, images: Path, found: Found) -> Masks | None:
        """The masks in a folder, None without one.

        Raises:
            PatchError: no such folder.
        """
        if not folder:
            return None
        masks = cls(Path(folder), images, found)
        for path in list_images(masks.folder, found.skips).images:
            inside = path.relative_to(masks.folder).with_suffix("").as_posix()
            masks._known.setdefault(inside, path)
        return masks

    def of_image(self, image: Path) -> str | None:
        """The path of an image's mask; None without one, which is counted or a problem."""
        inside = image.relative_to(self.images).with_suffix("").as_posix()
        mask = self._known.get(inside) or self._known.get(image.stem)
        if mask is not None:
            return str(mask)
        if self.found.skips.any_number:
            self.found.skips.add("images without a mask", [inside])
        else:
            self.found.problems.append(
                PatchError(
                    f"expected a mask for {image} in {self.folder}, found no image of that name: "
                    "add one (white counts, black does not), or give --skip_broken."
                )
            )
        return None
