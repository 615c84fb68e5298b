"""The digits split, the bundled classifier and the bundled base."""

import hashlib
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from training.base.frozen import FrozenBase, load_frozen
from training.data.sources import digits_images
from training.data.sources.digits_images import load_digits_split, split_indices
from training.experiments.digits.make_base import RECIPE
from training.experiments.miniature.muon import Muon, make_muon, orthogonalise
from training.experiments.miniature.pretraining import Pretraining, build_base, untie
from training.objective.digit_classifier import DigitClassifier, load_digit_classifier
from training.objective.frechet import frechet_distance
from training.objective.labelled import labelled_losses, labelled_samples
from training.options.config import TrainConfig

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return load_frozen(TrainConfig(base="digits"))


def test_split_is_the_pinned_one():
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        split = load_digits_split(name)
        levels = ((split.images + 1) * 8).to(torch.uint8)
        digest.update(bytes(levels.flatten().tolist()) + bytes(split.labels.tolist()))
    # Every bundled figure rests on this split: changing it needs new weights and new numbers.
    assert digest.hexdigest()[:16] == "58f3511dffd32eeb"


def test_split_is_disjoint_complete_and_stratified():
    labels = [row * 7 % 10 for row in range(1797)]
    splits = split_indices(labels)
    assert sorted(sum(splits.values(), [])) == list(range(1797))
    for name, expected in (("validation", 30), ("test", 40)):
        for split_labels in ([labels[row] for row in splits[name]], load_digits_split(name).labels):
            assert torch.as_tensor(split_labels).bincount().tolist() == [expected] * 10


def test_no_test_image_is_in_another_split():
    seen = {tuple(x.flatten().tolist()) for n in ("train", "validation") for x in images_of(n)}
    assert not seen & {tuple(x.flatten().tolist()) for x in images_of("test")}


def images_of(name: str) -> torch.Tensor:
    return load_digits_split(name).images


def test_images_fill_the_range():
    images = images_of("train")
    assert images.shape == (1097, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert images[..., 0].mean() < -0.9  # the left margin is background: -1, not +1


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="found 'dev'"):
        load_digits_split("dev")


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    digits_images._load_all.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install"):
        load_digits_split("train")


def test_classifier_recognises_test_digits():
    split, classifier = load_digits_split("test"), load_digit_classifier()
    accuracy = (classifier(split.images).argmax(1) == split.labels).double().mean()
    assert accuracy > 0.97
    assert classifier.features(split.images).shape == (400, 64)


def test_classifier_refuses_other_shapes_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"found \(2, 1, 28, 28\)"):
        DigitClassifier().features(torch.zeros(2, 1, 28, 28))
    with pytest.raises(FileNotFoundError, match="make_base.py"):
        load_digit_classifier(tmp_path / "none.safetensors")


def test_base_is_what_the_readme_says(base):
    assert base.scheduler.config.prediction_type == "epsilon"
    assert base.scheduler.config.num_train_timesteps == 1000
    assert sum(p.numel() for p in base.model.parameters()) == 584900
    # One embedding for all blocks, as in the original DiT: a gate sees block 0's for all sites.
    embeddings = [block.norm1.emb.state_dict() for block in base.model.transformer_blocks]
    for name, value in embeddings[0].items():
        assert all(torch.equal(value, other[name]) for other in embeddings[1:])


def test_base_denoises_validation_images_and_uses_the_label(base):
    split = load_digits_split("validation")
    loss = labelled_losses(base, split.images, split.labels, draws=1).mean(0)
    assert (loss[0] > loss[4]) and (loss[4] > loss[9])
    assert loss.mean() < 0.075  # predicting zero scores 1; the README has the measured value
    wrong = (split.labels + 1) % 10
    wrong_loss = labelled_losses(base, split.images, wrong, draws=1)
    null = torch.full_like(split.labels, RECIPE.classes)
    null_loss = labelled_losses(base, split.images, null, draws=1)
    assert loss.mean() < null_loss.mean() < wrong_loss.mean()


def test_base_draws_the_digit_it_is_asked_for(base):
    labels = torch.arange(10).repeat(20)
    images, classifier = labelled_samples(base, labels, seed=0, steps=10), load_digit_classifier()
    assert (classifier(images).argmax(1) == labels).double().mean() > 0.9
    real = classifier.features(images_of("validation"))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    distance = frechet_distance(classifier.features(images), real)
    assert distance < 0.1 * frechet_distance(classifier.features(noise), real)


@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (64, 16)])
def test_orthogonalise_levels_singular_values_and_keeps_their_vectors(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values.clamp(min=0.1 * values.max())  # Newton-Schulz leaves very small ones behind
    inside = left.mT @ orthogonalise((left * values.unsqueeze(-2)) @ right) @ right.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(diagonal), atol=1e-3, rtol=0)


def test_muon_follows_the_gradient_and_refuses_vectors():
    weight = torch.nn.Parameter(torch.zeros(4, 8))
    goal = torch.eye(4, 8)
    optimizer = Muon([weight], lr=0.05, momentum=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        (weight - goal).square().sum().backward()
        optimizer.step()
    assert (weight - goal).abs().max() < 0.1
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_muon_takes_the_steps_of_torch(shape):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    ours = Muon(weights[:1], lr=0.02, weight_decay=0.1)
    theirs = make_muon(weights[1:], lr=0.02, weight_decay=0.1)
    assert isinstance(theirs, torch.optim.Muon)
    for _ in range(10):
        gradient = torch.randn(shape, generator=draw)
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert (weights[0] - weights[1]).norm() < 0.02 * (weights[0] - start).norm()  # bfloat16


def test_muon_of_older_releases(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    made = make_muon([torch.nn.Parameter(torch.zeros(4, 8))], lr=0.1, weight_decay=0.2)
    assert isinstance(made, Muon)
    assert {k: v for k, v in made.param_groups[0].items() if k != "params"} == {
        "lr": 0.1, "momentum": 0.95, "weight_decay": 0.2
    }  # fmt: skip
    with pytest.raises(ValueError, match="matrices only"):
        make_muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)


def _trained(recipe, data):
    run = Pretraining(recipe, data.images, data.labels)
    run.run(recipe.steps, print)
    return untie(run.average)


def test_training_is_reproducible_and_tied_embeddings_survive_saving(tmp_path):
    recipe = replace(RECIPE, layers=2, heads=1, steps=3, warmup=1, batch=8)
    data = load_digits_split("train")
    model, again = (_trained(recipe, data) for _ in range(2))
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    other, untrained = again.state_dict(), untie(build_base(recipe)).state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, other[name]), name
    assert not torch.equal(loaded.proj_out_2.weight, untrained["proj_out_2.weight"])


def test_script_runs_from_any_folder(tmp_path, monkeypatch, capsys):
    """As Python runs a script: its folder stands first on the path, the repository nowhere."""
    script = ROOT / "training" / "experiments" / "digits" / "make_base.py"
    others = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(script.parent), *others])
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path), "--extra", "-1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2 and "--extra: expected a fraction" in capsys.readouterr().err
    assert sys.path == [str(ROOT), *others]
