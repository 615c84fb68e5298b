"""Models on the base and off it again, on a tiny base of digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmp_common import PatchError
from tests.training.conftest import Go
from training.base.frozen import FrozenBase, load_frozen
from training.evaluation.models import Spec, load_compared
from training.options.command_line import resolve


def frozen_base(folder: Path) -> FrozenBase:
    given = {"base": "tiny-digits", "pretrained_model_name_or_path": str(folder)}
    return load_frozen(resolve(given))


def predicted(frozen: FrozenBase) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"labels": torch.tensor([1, 2])}
    with torch.no_grad():
        return frozen.family.predict(frozen.model, x, torch.tensor([3, 700]), given)


def trained(go: Go, method: str, **options: object) -> Spec:
    _, events = go(method=method, learning_rate=0.05, max_train_steps=2, **options)
    return Spec(method, method, str(events.outputs.path()))


@pytest.mark.parametrize("method", ["dmp", "prompt", "lora", "full", "joint"])
def test_each_goes_on_the_base_and_off_it(method: str, go: Go, digits_base: Path) -> None:
    spec = trained(go, method)
    frozen = frozen_base(digits_base)
    model, names = frozen.model, [n for n, _ in frozen.model.named_modules()]
    before = predicted(frozen)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    compared = load_compared(spec)
    with compared.on(frozen) as on:
        inside = predicted(on)
        assert not torch.equal(inside, before)
    with pytest.raises(KeyError), compared.on(frozen):
        raise KeyError("in between")
    assert frozen.model is model
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(predicted(frozen), before)
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    with compared.on(frozen) as on:
        assert torch.equal(predicted(on), inside)
    assert compared.trained == {"learning_rate": 0.05, "ema_decay": 0.99, "steps": 2}
    full = sum(p.numel() for p in model.parameters())
    assert (compared.parameters >= full) == (method in ("full", "joint"))


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("dmp", "prompt", "its kind is dmp"),
        ("prompt", "dmp", "its kind is prompt"),
        ("dmp", "lora", "expected a LoRA with its rank"),
        ("lora", "dmp", "found a LoRA"),
        ("lora", "full", "expected a folder with one denoiser"),
    ],
)
def test_another_kind_is_an_error(method: str, kind: str, message: str, go: Go) -> None:
    spec = trained(go, method)
    with pytest.raises(PatchError, match=message):
        load_compared(Spec("x", kind, spec.path))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_of_another_base_is_an_error(method: str, go: Go) -> None:
    from training.base.places import DIGITS_BASE

    compared = load_compared(trained(go, method))
    digits = load_frozen(resolve({"base": "digits"}))
    before = {n: t.clone() for n, t in digits.model.state_dict().items()}
    with pytest.raises(PatchError, match="base digits"), compared.on(digits):
        pass
    assert DIGITS_BASE.is_dir()
    assert before.keys() == digits.model.state_dict().keys()
