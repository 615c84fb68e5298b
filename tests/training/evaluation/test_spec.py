"""What --model may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmp_common import PatchError
from training.evaluation.spec import RowSettings, Spec


def test_settings_stand_behind_the_path() -> None:
    found = Spec.parse("half=dmp:out/a.safetensors@steps=10, guidance=1.5,epsilon=tune,strength=-2")
    wanted = {"steps": 10, "guidance": 1.5, "epsilon": "tune", "strength": -2}
    assert found == Spec("half", "dmp", "out/a.safetensors", RowSettings.model_validate(wanted))
    assert found.trained and found.sampled_alone
    plain = Spec.parse("more bits=base:@quantization=q8_0")
    assert (plain.kind, plain.path, plain.settings.quantization) == ("base", "", "q8_0")
    assert not plain.trained and not plain.sampled_alone
    assert not Spec.parse("a=dmp:b").sampled_alone


def test_paths_may_hold_colons_and_ats(tmp_path: Path) -> None:
    windows = r"C:\x\y@2.safetensors"
    assert Spec.parse(f"a b=dmp:{windows}").path == windows
    path = tmp_path / "a@steps=10"
    assert Spec.parse(f"a=dmp:{path}").path.endswith("a")
    path.touch()
    assert Spec.parse(f"a=dmp:{path}").path == str(path)


@pytest.mark.parametrize(
    "text",
    [
        *("a", "a=dmp", "a=dmp:", "a=what:b", "=dmp:b", "a=base:b", "a=dmp:@steps=3"),
        *("base=dmp:b", "full model=dmp:b", "cheap model as it is=base:@steps=3"),
    ],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(PatchError, match="expected"):
        Spec.parse(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("steps=0", "steps: expected a number of at least 1, found '0'"),
        ("epsilon=-1", "epsilon: expected a positive number such as 1.01, or tune"),
        ("steps=x,size=3", "a setting out of steps, guidance, .*found 'size=3'; steps: expected"),
        ("guidance=2,guidance=3", "guidance once, found it twice"),
        ("quantization=rtn4", "quantization only for kind base, found it for dmp"),
    ],
)
def test_wrong_settings_are_named(settings: str, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        Spec.parse(f"a=dmp:b@{settings}")
