"""The pre-training of the miniature bases, and CIFAR-10's split, classifier and folders."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from training.experiments.miniature import cifar
from training.experiments.miniature.cifar import (
    CLASSES,
    export_folders,
    load_cifar_split,
    split_names,
)
from training.experiments.miniature.cifar_classifier import (
    FEATURES,
    features_of,
    load_cifar_classifier,
    train_cifar_classifier,
)
from training.experiments.miniature.make_cifar import RECIPES
from training.experiments.miniature.pretraining import Pretraining

SMALL = replace(RECIPES["cifar10-s"], layers=1, head_width=16, batch=4, warmup=1, steps=10)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(cifar, "PER_CLASS", {"validation": 1, "test": 2})


@pytest.fixture
def images(tmp_path):
    """Five pictures a class, each of one colour that tells class and number."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.full((32, 32, 3), (label, number, 0), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def _run(recipe, until):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    run = Pretraining(recipe, data, torch.arange(8))
    run.run(until, print)
    return run


def test_split_is_disjoint_complete_and_does_not_depend_on_the_order():
    names = [f"{n:04d}.png" for n in range(5000)]
    parts = [split_names(names, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [4000, 500, 500]
    assert sorted(sum(parts, [])) == names
    assert split_names(names[::-1], "test") == parts[2]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_and_a_zip_give_equal_images(few, images, tmp_path, zipped):
    source = images
    if zipped:
        source = tmp_path / "images.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in images.glob("*/*.png"):
                archive.write(path, f"top/{path.parent.name}/{path.name}")
    split = load_cifar_split(source, "test")
    assert split.images.shape == (20, 3, 32, 32) and split.images.dtype == torch.uint8
    assert torch.equal(split.images[:, 0, 5, 5].long(), split.labels)
    others = load_cifar_split(source, "train").images[:, 1, 0, 0]
    assert set(split.images[:2, 1, 0, 0].tolist()).isdisjoint(others[:2].tolist())


def test_exported_folders_hold_each_image_once(few, images, tmp_path):
    export_folders(images, tmp_path / "out")
    for name in CLASSES:
        found = sorted(p.name for p in (tmp_path / "out").glob(f"*/{name}/*"))
        assert found == [f"{n}.png" for n in range(5)]


def test_wrong_data_are_told(few, images, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected CIFAR-10"):
        load_cifar_split(tmp_path / "none", "train")
    with pytest.raises(ValueError, match="more than 3 images of each class, found 2"):
        split_names(["a.png", "b.png"], "train")
    held = split_names([f"cat/{n}.png" for n in range(5)], "test")[0]
    Image.new("RGB", (8, 8)).save(images / held)
    with pytest.raises(ValueError, match=rf"32 x 32 pixels, found \(8, 8\) in {held}"):
        load_cifar_split(images, "test")
    for path in (images / "ship").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="expected a folder 'ship'"):
        load_cifar_split(images, "train")


def test_the_rate_is_constant_and_then_falls_to_zero():
    recipe = replace(RECIPES["cifar10"], steps=1000, annealed=0.2, warmup=10)
    assert recipe.constant_steps == 800
    assert [recipe.rate(step) for step in (4, 10, 800, 900, 1000)] == [0.5, 1, 1, 0.5, 0]
    cosine = replace(recipe, annealing="cosine")
    assert cosine.rate(505) == pytest.approx(0.5) and cosine.constant_steps == 0


def test_training_goes_on_bit_for_bit_and_a_longer_run_shares_the_constant_part(tmp_path):
    whole = _run(SMALL, 6)
    part = _run(SMALL, 4)
    part.save(tmp_path / "4.pt")
    longer = _run(replace(SMALL, steps=20), 0)
    longer.load(tmp_path / "4.pt")
    longer.run(6, print)  # both are in their constant part
    for a, b in zip(whole.average.parameters(), longer.average.parameters(), strict=True):
        assert torch.equal(a, b)
    before = [p.clone() for p in whole.model.parameters()]
    whole.run(10, print)
    moved = [not torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_states_of_another_muon_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.delattr(torch.optim, "Muon")
        _run(SMALL, 1).save(tmp_path / "1.pt")
    with pytest.raises(ValueError, match="expected a state with the Muon of torch"):
        _run(SMALL, 0).load(tmp_path / "1.pt")


def test_classifier_learns_two_colours_and_its_file_gives_it_back(tmp_path):
    from safetensors.torch import save_file

    labels = torch.arange(256) % 2
    images = (labels * 200)[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
    data = cifar.ImageSplit(images.contiguous(), labels)
    model = train_cifar_classifier(data, epochs=22)
    features = features_of(model, data.images)
    assert features.shape == (256, FEATURES)
    assert (model.classify(features).argmax(1) == labels).all()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "c.safetensors"
    )
    assert torch.equal(
        features_of(load_cifar_classifier(tmp_path / "c.safetensors"), images), features
    )
    with pytest.raises(ValueError, match="expected images"):
        model.features(torch.zeros(1, 1, 8, 8))
    with pytest.raises(FileNotFoundError, match="make it with"):
        load_cifar_classifier(tmp_path / "none")
