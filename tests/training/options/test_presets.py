"""Which recipe is the default, and what explicit options change of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.options.command_line import as_toml, resolve, with_base
from training.options.presets import RECIPES, recipe_lines


@pytest.mark.parametrize("base", ["sd15", "sdxl", "flux", "dit-xl/2", "pixart", "sd3", "mine"])
@pytest.mark.parametrize("method", ["dmp", "prompt", "lora", "full"])
def test_the_papers_recipe_is_the_default_where_none_is_better(base: str, method: str) -> None:
    config = resolve({"base": base, "train_data_dir": "x", "method": method})
    assert config.recipe == "paper"
    for name, value in RECIPES["paper"].items():
        assert getattr(config, name) == value, name
    assert config.max_train_steps == 50_000
    assert config.gate == "linear"
    assert config.min_timestep == 0


def test_digits_and_cifar_keep_what_was_measured() -> None:
    for base in ("digits", "cifar10-s"):
        config = resolve({"base": base})
        assert (config.recipe, config.learning_rate, config.train_batch_size) == ("none", 3e-4, 128)
        assert config.global_batch_size is None


def test_the_quickstart_has_settings_of_its_own() -> None:
    """A repair of the digits is short; elsewhere the recipe is as it was, and data is the paper's
    objective."""
    rounded = {"base": "digits", "student_quantization": "rtn3"}
    for options in ({"recipe": "repair"}, {"objective": "distill"}):
        config = resolve({**rounded, **options})
        sizes = (config.max_train_steps, config.train_batch_size, config.report_samples)
        assert (config.recipe, sizes) == ("repair", (200, 64, 200))
        assert "changed by you" not in " ".join(recipe_lines(config))
    assert resolve({**rounded, "recipe": "repair", "max_train_steps": 7}).max_train_steps == 7
    other = {"base": "sd15", "train_data_dir": "x", "student_quantization": "rtn3"}
    assert resolve({**other, "recipe": "repair"}).max_train_steps == 1000
    assert (
        resolve({"base": "digits", "objective": "data"}).recorded()
        == resolve({"base": "digits"}).recorded()
    )


def test_recipe_none_gives_the_plain_defaults() -> None:
    config = resolve({"base": "sd15", "recipe": "none"})
    assert (config.learning_rate, config.max_train_steps, config.ema_decay) == (1e-3, 1600, 0.99)
    assert (config.lr_scheduler, config.prompt_scale) == ("cosine", "mean")


def test_explicit_options_win_over_the_recipe() -> None:
    config = resolve({"base": "sd15", "gradient_accumulation_steps": 2, "learning_rate": 0.5})
    assert (config.gradient_accumulation_steps, config.global_batch_size) == (2, None)
    assert config.learning_rate == 0.5
    both = resolve({"base": "sd15", "gradient_accumulation_steps": 2, "global_batch_size": 64})
    assert both.global_batch_size == 64


def test_another_base_takes_its_own_recipe() -> None:
    """What presets and recipes set is no wish of the user's."""
    found = resolve({"pretrained_model_name_or_path": "w.safetensors", "seed": 4})
    assert found.recipe == "paper"
    digits = with_base(found, "digits")
    assert (digits.recipe, digits.seed, digits.learning_rate) == ("none", 4, 3e-4)
    assert digits.output_name == "digits-dmp"


def test_the_resolved_file_is_read_back_as_it_is(tmp_path) -> None:
    for options in ({}, {"gradient_accumulation_steps": 3}, {"recipe": "none"}, {"method": "lora"}):
        config = resolve({"base": "sd15", "train_data_dir": "x", **options})
        file = tmp_path / "run.toml"
        file.write_text(as_toml(config), encoding="utf-8")
        assert resolve({"config_file": str(file)}).recorded() == config.recorded()


def test_recipe_lines_say_which_why_and_what_it_costs() -> None:
    first, cost = recipe_lines(resolve({"base": "sd15"}))
    assert first.startswith("recipe: paper, since none was shown to be better on sd15")
    assert cost.strip().startswith("50,000 steps of 128 images: 6,400,000 images")
    lines = recipe_lines(resolve({"base": "sd15", "learning_rate": 0.5, "max_train_epochs": 3}))
    assert "3 epochs, in steps of 128 images" in lines[1]
    assert lines[2].strip() == "changed by you: learning_rate 0.5 instead of 0.0001"
    assert "its own" in recipe_lines(resolve({"base": "digits"}))[0]
    assert "as you asked" in recipe_lines(resolve({"base": "digits", "recipe": "clean"}))[0]


@pytest.mark.parametrize(
    ("sizes", "batch", "accumulated", "together"),
    [
        (("", ""), 4, 1, 128),  # the preset of the base, and the recipe's 128
        (("batch_size = 3", ""), 3, 1, None),
        (("", "batch_size = 2"), 4, 1, None),
    ],
)
def test_a_dataset_file_says_what_a_step_is(
    sizes: tuple[str, str], batch: int, accumulated: int, together: int | None, tmp_path: Path
) -> None:
    general, own = sizes
    text = f"[general]\n{general}\n[[datasets]]\n{own}\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    text += "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'b'\n"
    file = tmp_path / "data.toml"
    file.write_text(text, encoding="utf-8")
    config = resolve({"base": "sd15", "dataset_config": str(file)})
    assert config.train_batch_size == batch
    assert config.gradient_accumulation_steps == accumulated
    assert config.global_batch_size == together


def test_an_explicit_batch_is_a_step_unless_a_recipe_is_asked_for() -> None:
    data = {"base": "sd15", "train_data_dir": "x", "train_batch_size": 2}
    assert resolve(data).global_batch_size is None
    assert resolve({**data, "recipe": "paper"}).global_batch_size == 128
    assert resolve({**data, "global_batch_size": 8}).global_batch_size == 8
