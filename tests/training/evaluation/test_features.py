"""Feature extractors: from a path, from Python, and Inception where torch-fidelity works."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmp_common import PatchError
from training.evaluation.features import Extractor, Inception, load_extractor
from training.evaluation.metrics import within
from training.objective.frechet import sfid


class Means(nn.Module):
    """Features (B, 3), and a map for sFID."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean((2, 3)), torch.cat([images] * 3, dim=1)


def make_means() -> nn.Module:
    return Means()


def make_nothing() -> None:
    return None


def test_any_module_is_an_extractor() -> None:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    found = Extractor("means", Means())(images)
    torch.testing.assert_close(found.pooled, images.mean((2, 3)))
    assert found.spatial is not None
    assert found.spatial.shape == (4, 7 * 64)
    plain = Extractor("flat", nn.Flatten())(images)
    assert plain.pooled.shape == (4, 192)
    assert plain.spatial is None


@pytest.mark.parametrize("module", [nn.Identity(), nn.Linear(5, 2)])
def test_a_module_that_does_not_fit_is_named(module: nn.Module) -> None:
    with pytest.raises(PatchError, match=r"feature extractor .*odd|found odd"):
        Extractor("odd", module)(torch.zeros(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # the category changes between releases
def test_extractors_by_name(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    path = tmp_path / "flat.pt"
    torch.jit.save(torch.jit.trace(nn.Flatten(), images), path)
    scripted = load_extractor("sd15", chosen=str(path))
    assert scripted is not None
    assert torch.equal(scripted(images).pooled, images.flatten(1))
    named = load_extractor("sd15", chosen=f"{__name__}:make_means")
    assert named is not None
    assert named(images).pooled.shape == (2, 3)
    assert load_extractor("sd15") is None
    digits = load_extractor("digits")
    assert digits is not None
    assert digits(torch.zeros(2, 1, 8, 8)).pooled.shape == (2, 64)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # the category changes between releases
def test_wrong_names_are_explained(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"nothing")
    for chosen, message in (
        (str(broken), "expected a TorchScript file"),
        ("nowhere.pt", "expected a TorchScript file or"),
        ("no.such.module:make", "expected a function make in module no.such.module"),
        (f"{__name__}:absent", "expected a function absent"),
        (f"{__name__}:make_nothing", "to return a torch.nn.Module, found NoneType"),
    ):
        with pytest.raises(PatchError, match=message):
            load_extractor("digits", chosen=chosen)
    with pytest.raises(PatchError, match="expected one feature extractor"):
        load_extractor("digits", chosen="a:b", inception_weights="c")


def test_weights_are_checked_by_hash_and_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(PatchError, match="check --inception_weights"):
        Inception(path)
    torch.save({"a": torch.zeros(1)}, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(PatchError, match=f"begins with 6726825d .*found {found}"):
        Inception(path)
    with pytest.raises(PatchError, match="at least eight hex digits"):
        Inception(path, "67")
    torch.save(nn.Linear(1, 1), path)  # a pickle of more than tensors
    with pytest.raises(PatchError, match="expected a dictionary of tensors"):
        Inception(path, hashlib.sha256(path.read_bytes()).hexdigest())
    path.write_bytes(b"no weights at all")
    with pytest.raises(PatchError, match="expected a dictionary of tensors"):
        Inception(path, hashlib.sha256(path.read_bytes()).hexdigest())


def torch_fidelity_or_skip() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity does not work here: {error}")


@pytest.mark.filterwarnings("ignore")  # of torchvision and torch-fidelity
def test_inception_gives_what_a_hook_of_its_own_sees(tmp_path: Path) -> None:
    torch_fidelity_or_skip()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None

    torch.manual_seed(0)
    path = tmp_path / "random.pth"
    torch.save({}, path)
    network = Unloaded("inception-v3-compat", ["2048"], str(path))
    torch.save(nn.Module.state_dict(network), path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(PatchError, match="begins with 6726825d"):
        Inception(path)
    extractor = Extractor("Inception", Inception(path, digits[:10]))
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda m, a, output: seen.append(output))
    features = []
    for seed in (0, 1):
        images = torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        features.append(extractor(images))
        levels = ((images + 1) * 127.5).round().to(torch.uint8)
        (pooled,) = network(levels)
        torch.testing.assert_close(features[-1].pooled, pooled)
        assert features[-1].spatial is not None
        assert features[-1].spatial.shape == (6, 2023)
        expected = seen[-1].permute(0, 2, 3, 1)[..., :7].reshape(6, -1)  # as TensorFlow has it
        ours = features[-1].spatial.reshape(6, 7, 289).transpose(1, 2).reshape(6, -1)
        torch.testing.assert_close(ours, expected)
    a, b = (seen[k][:, :7].flatten(1).double() for k in (0, 1))
    # For C = X^T X the trace of (C_a C_b)^1/2 is the sum of the singular values of X_a X_b^T. The
    # root of a product with many zero eigenvalues is NaN in some releases of scipy.
    x_a, x_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    distance = float((a.mean(0) - b.mean(0)).square().sum())
    distance += float(x_a.square().sum() + x_b.square().sum())
    distance -= 2 * float(torch.linalg.svdvals(x_a @ x_b.T).sum())
    assert features[0].spatial is not None
    assert features[1].spatial is not None
    assert sfid(features[1].spatial, features[0].spatial) == pytest.approx(distance, rel=1e-3)
    grey = extractor(torch.zeros(2, 1, 8, 8))
    assert torch.equal(grey.pooled, extractor(torch.zeros(2, 3, 8, 8)).pooled)


@pytest.mark.filterwarnings("ignore")
def test_precision_and_recall_are_torch_fidelitys() -> None:
    torch_fidelity_or_skip()
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(0)
    real = torch.randn(90, 5, generator=generator)
    made = torch.randn(70, 5, generator=generator) * 0.9 + 1.2
    found = prc_features_to_metric(  # since 0.4 the generated ones come first
        made, real, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=False, verbose=False
    )
    assert float(within(made, real).double().mean()) == pytest.approx(found["precision"])
    assert float(within(real, made).double().mean()) == pytest.approx(found["recall"])
    assert 0 < found["recall"] < 1
    assert 0 < found["precision"] < 1
