"""From batches to what the student takes: masks, and the loss that they and the options make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from PIL import Image
from torch import Tensor

from dmp_common import Patch, PatchError
from tests.tiny import FAMILIES
from training.base.encoders import FrozenEncoders
from training.base.frozen import load_frozen
from training.data.batch import Batch, Position
from training.objective.inputs import Inputs, encode
from training.objective.labelled import pixel_base
from training.objective.losses import losses_by_bin
from training.objective.noising import process_of
from training.objective.student import Student
from training.options.config import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture
def student_of(digits_base: Path) -> Callable[..., tuple[Student, Callable[..., Inputs]]]:
    """A student of the tiny base with some options, and how its inputs are made."""

    def student_of(**options: object) -> tuple[Student, Callable[..., Inputs]]:
        config = TrainConfig(
            base="tiny-digits", pretrained_model_name_or_path=str(digits_base), **options
        )
        frozen = load_frozen(config)
        student = Student(frozen, None, process_of(frozen.scheduler, config), config)
        encoders = FrozenEncoders(frozen, config)

        def inputs(masks: Tensor | None = None) -> Inputs:
            pixels = torch.linspace(-1, 1, 192).reshape(3, 1, 8, 8)
            batch = Batch(
                ["a", "b", "c"], torch.zeros(3, 6, dtype=torch.long), Position(), pixels,
                labels=torch.arange(3), masks=masks,
            )  # fmt: skip
            return encode(batch, encoders, config, [("x", n) for n in range(3)], CPU)

        return student, inputs

    return student_of


T = torch.tensor([100, 500, 900])


def losses(student: Student, inputs: Inputs) -> Tensor:
    process, draws = student._process, inputs.draws
    noise = draws.noise if draws.entering is None else draws.entering
    noisy = process.noisy(inputs.clean, noise, T)
    target = process.target(inputs.clean, draws.noise, T)
    return student(noisy, T, inputs.given, target, 0, None, inputs.masks)["samples"]


def halves() -> Tensor:
    """Masks that show all, the upper half and nothing."""
    masks = torch.ones(3, 1, 8, 8)
    masks[1, :, 4:] = 0
    masks[2] = 0
    return masks


@pytest.mark.parametrize("option", ["masked_loss", "alpha_mask"])
def test_masks_hide_places_from_training_and_validation(student_of, option: str) -> None:
    plain, inputs = student_of()
    whole = losses(plain, inputs())
    assert inputs(halves()).masks is None  # no option asks for them
    student, inputs = student_of(**{option: True})
    shown = inputs(halves())
    masked = losses(student, shown)
    assert masked[0] == whole[0] and masked[2] == 0
    assert 0.2 * whole[1] < masked[1] < 0.8 * whole[1]
    by_bin = [
        losses_by_bin(student, student._process, one, bins=2, draws=1, name="x")
        for one in (shown, inputs(torch.ones(3, 1, 8, 8)))
    ]
    assert torch.equal(by_bin[0][0], by_bin[1][0]) and not by_bin[0][2].any()
    # Some of the images keep their masks.
    assert torch.equal(shown.rows([2, 0]).masks, shown.masks[[2, 0]])


def test_masked_loss_without_masks_is_refused(student_of) -> None:
    _, inputs = student_of(masked_loss=True)
    with pytest.raises(PatchError, match=r"expected masks for --masked_loss.*\(a\)"):
        inputs()
    _, inputs = student_of(alpha_mask=True)
    assert inputs().masks is None  # of images without transparency


def test_masks_have_the_size_of_the_latent_by_area(folders: Callable[[str], Path]) -> None:
    config = TrainConfig(
        base=FAMILIES["dit"].base.name, pretrained_model_name_or_path=str(folders("dit")),
        masked_loss=True,
    )  # fmt: skip
    encoders = FrozenEncoders(load_frozen(config), config)
    masks = torch.zeros(1, 1, 16, 16)
    masks[:, :, :5] = 1  # two rows of the latent and a half
    batch = Batch(
        ["a"], torch.zeros(1, 6, dtype=torch.long), Position(), torch.zeros(1, 3, 16, 16),
        labels=torch.zeros(1, dtype=torch.long), masks=masks,
    )  # fmt: skip
    found = encode(batch, encoders, config, [("x",)], CPU)
    assert found.clean.shape[-2:] == (8, 8)
    assert found.masks is not None
    assert found.masks[0, 0, :, 3].tolist() == [1, 1, 0.5, 0, 0, 0, 0, 0]


def test_masks_hide_places_from_a_learned_variance_too() -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    torch.nn.init.normal_(model.proj_out_2.weight, std=0.1)
    config = TrainConfig(base="digits")
    frozen = pixel_base("digits", model.eval(), DDPMScheduler(variance_type="learned_range"))
    student = Student(frozen, None, process_of(frozen.scheduler, config), config)
    clean, noise = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given, t = {"labels": torch.zeros(2, dtype=torch.long)}, torch.tensor([0, 600])

    def terms(masks: Tensor | None) -> list[float]:
        noisy = student._process.noisy(clean, noise, t)
        found = student(noisy, t, given, noise, 0, None, masks, clean)
        return [float(found["variational"].detach()), float(found["denoising"].detach())]

    whole = terms(None)
    assert min(whole) > 0
    assert terms(torch.ones(2, 1, 8, 8)) == whole
    assert terms(torch.full((2, 1, 8, 8), 0.5)) == pytest.approx([x / 2 for x in whole])
    assert terms(torch.zeros(2, 1, 8, 8)) == [0, 0]


def test_held_out_latents_are_the_same_for_every_run(folders: Callable[[str], Path]) -> None:
    """Latents are drawn from the VAE's distribution, after the noise offset."""

    def clean(held_out: bool, offset: float) -> Tensor:
        config = TrainConfig(
            base=FAMILIES["dit"].base.name, pretrained_model_name_or_path=str(folders("dit")),
            noise_offset=offset,
        )  # fmt: skip
        encoders = FrozenEncoders(load_frozen(config), config)
        batch = Batch(
            ["a"], torch.zeros(1, 6, dtype=torch.long), Position(), torch.zeros(1, 3, 16, 16),
            labels=torch.zeros(1, dtype=torch.long),
        )  # fmt: skip
        return encode(batch, encoders, config, [("x",)], CPU, held_out).clean

    assert torch.equal(clean(True, 0.0), clean(True, 0.1))
    assert torch.equal(clean(True, 0.0), clean(False, 0.0))
    assert not torch.equal(clean(False, 0.0), clean(False, 0.1))


@pytest.mark.parametrize("kind", ["l1", "huber", "smooth_l1"])
def test_loss_type_changes_training_and_no_held_out_figure(student_of, kind: str) -> None:
    plain, inputs = student_of()
    student, _ = student_of(loss_type=kind)
    assert not torch.allclose(losses(plain, inputs()), losses(student, inputs()), rtol=1e-2)
    held_out = [
        losses_by_bin(one, one._process, inputs(), bins=2, draws=1, name="x")
        for one in (plain, student)
    ]
    assert torch.equal(*held_out)


def test_perturbed_input_meets_the_target_of_plain_noise(student_of) -> None:
    """With a huge perturbation the model cannot know the noise any more."""
    plain, inputs = student_of()
    student, perturbed = student_of(ip_noise_gamma=30.0)
    assert torch.equal(perturbed().draws.noise, inputs().draws.noise)
    assert not torch.allclose(losses(student, perturbed()), losses(plain, inputs()), rtol=1e-2)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("sd15", ["--loss_type", "huber", "--multires_noise_iterations", "4"]),
        ("sd15", ["--noise_offset", "0.1", "--adaptive_noise_scale", "0.1"]),
        ("flux", ["--loss_type", "smooth_l1", "--ip_noise_gamma", "0.1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_real_bases_train_with_them(base: str, options: list[str], train) -> None:
    patch = Patch.load(train(base, *options) / f"tiny-{base}-dmp.safetensors")
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())


@pytest.mark.parametrize("cache", [[], ["--cache_latents"]], ids=["read", "cached"])
def test_what_is_transparent_everywhere_teaches_nothing(cache, train, tmp_path) -> None:
    """From RGBA files to the patch: a loss that is 0 leaves its prompts at 0."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        picture = Image.new("RGBA", (16, 16), (60 * number, 128, 255, 0))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cat", encoding="utf-8")
    out = train("sd15", "--alpha_mask", *cache, "--train_data_dir", str(folder), data="")
    patch = Patch.load(out / "tiny-sd15-dmp.safetensors")
    assert not any(bool(t.any()) for n, t in patch.tensors().items() if n.startswith("prompts."))
