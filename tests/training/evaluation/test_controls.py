"""Which controls a report wants."""

from __future__ import annotations

from training.evaluation.controls import check_controls
from training.evaluation.models import PlainModel
from training.evaluation.spec import Spec


class Trained(PlainModel):
    """A model that only says what it is."""

    def __init__(self, kind: str, parameters: int = 100, ema: float = 0.99) -> None:
        super().__init__(Spec(kind, kind, "somewhere"))
        self.parameters = parameters
        self.metadata = {"ss_dmp_config": f'{{"ema_decay": {ema}}}'}


def test_controls_are_checked() -> None:
    dmp = Trained("dmp")
    alone = check_controls({"a": [dmp]})
    assert alone.missing == ["prompt", "lora", "full"]
    assert "learning rate, EMA" in alone.text
    models = {
        "a": [dmp], "b": [Trained("prompt")], "c": [Trained("lora", 120)], "d": [Trained("full")],
    }  # fmt: skip
    assert check_controls(models).text == ""
    models["c"] = [Trained("lora", 200)]
    models["d"] = [Trained("full", ema=0.0)]
    wrong = check_controls(models)
    assert not wrong.missing
    assert "c has 200 parameters, 2.00 times" in wrong.mismatches[0]
    assert "without EMA" in wrong.mismatches[1]


def test_repairs_want_no_second_model_and_plain_rows_want_nothing() -> None:
    assert check_controls({"a": [Trained("dmp")]}, repairs=True).missing == ["prompt", "lora"]
    plain = PlainModel(Spec("half", "base", ""))
    assert check_controls({"half": [plain]}).text == ""
    assert check_controls({}).text == ""
