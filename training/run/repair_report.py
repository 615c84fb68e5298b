"""What a repair did to the pictures of the digits base: picture, numbers, and how to go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmp_common import Attachment, Patch, attach
from dmp_common.patch.objectives import squared_distance
from training.base.frozen import FrozenBase, load_frozen
from training.data.sources.digits_images import NUM_CLASSES
from training.objective.intervals import Interval, ratio_interval
from training.objective.labelled import labelled_samples
from training.objective.sampling import draw_images, noises
from training.options.config import TrainConfig
from training.run.repair_pictures import repair_picture
from training.run.telling import Telling
from training.run.verdict import interval_json, percent

_SAMPLER, _STEPS = "unipc", 20  # a good sampler at a usual number of steps
_SEED = 1234  # of the noise, which no training and no validation sees
_STRIP = 10  # strengths from 0 to 1
# How to go on with a model that people have; a test parses the commands.
YOUR_GGUF = """\
python training/train_dmp.py --base sd15 --pretrained_model_name_or_path model.safetensors \
--train_data_dir photos --recipe repair --student_weights model-Q4_0.gguf --cache_teacher \
--output_dir output/repair"""
YOUR_FOLDER = """\
python training/train_dmp.py --base sd15 --pretrained_model_name_or_path model.safetensors \
--train_data_dir photos --recipe guidance --output_dir output/guidance"""
NEXT = f"""\
Now your model. A GGUF file that you run in ComfyUI, repaired with the help of the full model and a
folder of a few hundred pictures (photo.jpg, photo.txt with its caption):

    {YOUR_GGUF}

then put the patch into ComfyUI/models/dmp and open the workflow dmp-repair-quantised.
The same folder of pictures for a model in full precision, so that one call a step does what
guidance does with two:

    {YOUR_FOLDER}

Add --dry_run first: it checks everything and saves nothing. Hardware, times and other models:
docs/PATCHES.md."""


@dataclass(frozen=True)
class PictureRepair:
    """Squared distance of each picture to the full model's from equal noise, mean over pixels.

    Args:
        before: of the cheap model as it is (B,).
        after: of the cheap model with the patch (B,).
    """

    before: Tensor
    after: Tensor

    @property
    def gone(self) -> Interval:
        """The share of the distance that is gone, with its interval over pictures."""
        change = ratio_interval(self.before, self.after)
        return Interval(-change.mean, -change.high, -change.low)


def write_repair_report(
    config: TrainConfig,
    cheap: FrozenBase,
    exact: FrozenBase | None,
    path: Path,
    tell: Telling,
) -> None:
    """Writes samples.png, report.md and report.json beside the patch, and prints what they say.

    Args:
        cheap: the base with its cheap model, nothing attached.
        exact: the base itself; None where the training let it go, and it is loaded again.
        path: of the patch.
        tell: says how long drawing takes.
    """
    exact, patch = exact or load_frozen(config), Patch.load(path)
    # At least one picture of each digit, and two pictures for an interval.
    labels = torch.arange(NUM_CLASSES).repeat(-(-config.report_samples // NUM_CLASSES))
    with tell.timed(f"drawing {len(labels)} pictures with three models"):
        full, damaged = (_drawn(frozen, labels) for frozen in (exact, cheap))
        distances = squared_distance(damaged, full)
        shown = _most_damaged(distances)
        middle = int(shown[distances[shown].median(dim=0).indices])
        with attach(cheap.model, patch) as attachment:
            patched = _drawn(cheap, labels)
            strip = _strip(cheap, attachment, labels, middle)
    repair = PictureRepair(distances, squared_distance(patched, full))
    told = _told(config, path, repair)
    picture = repair_picture(
        full[shown],
        damaged[shown],
        patched[shown],
        strip,
        cheap_name=told["cheap"],
        gone=f"{repair.gone.mean:.0%}",
        size=told["size"],
    )
    picture.save(path.parent / "samples.png")
    (path.parent / "report.md").write_text(_text(config, told), encoding="utf-8")
    numbers = {
        "pictures": len(labels),
        "distance_before": float(repair.before.mean()),
        "distance_after": float(repair.after.mean()),
        "share_gone": interval_json(repair.gone),
        "patch_bytes": path.stat().st_size,
        "config": config.recorded(),
    }
    (path.parent / "report.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    print(f"\n{told['sentence']}\nThe picture: {(path.parent / 'samples.png').as_posix()}")


def _drawn(frozen: FrozenBase, labels: Tensor) -> Tensor:
    """One picture (B, 1, H, W) of each label, from the model as it is now."""
    return labelled_samples(frozen, labels, seed=_SEED, steps=_STEPS, sampler=_SAMPLER)


def _strip(cheap: FrozenBase, attachment: Attachment, labels: Tensor, place: int) -> Tensor:
    """The picture of a place among the labels at strengths from 0 to 1 (strengths, 1, H, W)."""
    config: Any = cheap.model.config
    given, pictures = {"labels": labels[[place]]}, []
    noise, _ = noises([(_SEED, place)], (cheap.channels, config.sample_size, config.sample_size))
    noise = noise.to(next(cheap.model.parameters()).device)
    for number in range(_STRIP):
        attachment.strength = number / (_STRIP - 1)
        pictures.append(
            draw_images(cheap, noise, given, None, steps=_STEPS, scale=1.0, sampler=_SAMPLER)
        )
    return torch.cat(pictures)


def _most_damaged(distances: Tensor) -> Tensor:
    """Of each class the place (classes,) of the picture with the largest of distances (B,)."""
    by_class = distances.unflatten(0, (-1, NUM_CLASSES))  # (pictures of a class, classes)
    return by_class.argmax(dim=0) * NUM_CLASSES + torch.arange(NUM_CLASSES)


def _told(config: TrainConfig, path: Path, repair: PictureRepair) -> dict[str, Any]:
    """What the report says in words, by name."""
    name = str(config.student_quantization or Path(str(config.student_weights)).name)
    bits = name.removeprefix("rtn")
    cheap = f"in {bits[0]} bits" if bits != name else f"in {name}"
    size, gone = f"{path.stat().st_size / 1000:.0f} KB", repair.gone
    change = (
        f"{percent(gone, 1)} of it is gone"
        if gone.excludes_zero and gone.mean > 0
        else f"not repaired: {percent(gone, 1)} of it is gone"
    )
    return {
        "cheap": cheap,
        "size": size,
        "sentence": (
            f"pictures: {len(repair.before)} from fresh noise, squared distance to the full "
            f"model's {float(repair.before.mean()):.4f} -> {float(repair.after.mean()):.4f}; "
            f"{change} (95 % interval over pictures). The patch is {path.stat().st_size:,} bytes."
        ),
    }


def _text(config: TrainConfig, told: dict[str, Any]) -> str:
    sentence = told["sentence"].removeprefix("pictures: ")
    return "\n".join(
        [
            f"# {config.output_name}: the model {told['cheap']}, repaired",
            "",
            f"{sentence} Drawn in {_STEPS} steps of UniPC from noise that neither training nor "
            f"validation saw; one training with seed {config.seed}.",
            "",
            "![the full model, the cheap one, and the cheap one with the patch](samples.png)",
            "",
            "Every column begins with the same noise. Of each digit the picture is shown that "
            "rounding damages most; the numbers are of all pictures. Red is the distance to the "
            "full model's picture. The last row is the one of median damage at rising strength.",
            "",
            "The verdict on held-out images, by noise level, is in "
            f"[{config.output_name}.json]({config.output_name}.json).",
            "",
            NEXT,
            "",
        ]
    )
