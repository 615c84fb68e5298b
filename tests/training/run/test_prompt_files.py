"""Prompt files as kohya writes them: .txt, .toml and .json, with all that is wrong at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.conftest import Start
from training.options.problems import ConfigError
from training.run.prompt_files import read_prompt_file, read_prompts

VALUES = {
    "prompt": "a cat", "negative_prompt": "low quality, dog", "width": 512, "height": 768,
    "seed": 1, "sample_steps": 28, "scale": 7.5, "sample_sampler": "euler_a",
}  # fmt: skip


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_three_formats_say_the_same(mark: str, tmp_path: Path) -> None:
    line = "a cat --n low quality, dog --w 512 --h 768 --d 1 --s 28 --l 7.5 --ss euler_a"
    table = (
        "[prompt]\nwidth = 512\nheight = 768\nscale = 7.5\nseed = 5\n[[prompt.subset]]\n"
        "prompt = 'a cat'\nnegative_prompt = 'low quality, dog'\nsample_steps = 28\nseed = 1\n"
        "sample_sampler = 'euler_a'\n[[prompt.subset]]\nprompt = 'a dog'\n"
    )
    texts = {
        "p.txt": f"# prompts\n\n{line}\na dog\n",
        "p.toml": table,
        "p.json": json.dumps([VALUES, "a dog"]),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(mark + text, encoding="utf-8")
        first, second = read_prompt_file(tmp_path / name)
        assert first.values == VALUES
        assert second.values["prompt"] == "a dog"
    assert second.values == {"prompt": "a dog"}
    assert read_prompt_file(tmp_path / "p.txt")[0].where == "line 3"


@pytest.mark.parametrize(
    ("name", "text", "messages"),
    [
        ("p.txt", "a --w wide\nb --q 1\nc --s 0\n--n x", [
            "line 1: expected a number for width, found wide", "line 2: expected one of --n",
            "line 3: expected sample_steps of at least 1", "line 4: expected a prompt, found none",
        ]),
        ("p.txt", "a --ss magic", ["line 1: expected one of ddim, "]),
        ("p.txt", "# nothing\n", ["expected a prompt in"]),
        ("p.json", "{", ["expected prompts in UTF-8, found"]),
        ("p.json", "[3]", ["prompt 1: expected a text or a table, found 3"]),
        ("p.json", "{}", ["expected a prompt in"]),
        ("p.toml", "a = 1", ["expected a table [prompt], found none"]),
        ("p.toml", "[prompt]\nsubset = 3", ["expected tables [[prompt.subset]], found 3"]),
        ("p.toml", "[", ["expected TOML"]),
        ("none.txt", None, ["none.txt"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_is_told_at_once(
    name: str, text: str | None, messages: list[str], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_prompt_file(tmp_path / name)
    assert len(caught.value.problems) == len(messages)
    for message, problem in zip(messages, caught.value.problems, strict=True):
        assert message in problem
        assert problem.startswith("--sample_prompts")


def test_a_base_refuses_all_prompts_that_do_not_fit(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("3 --ss euler --l 2\nten\n12\n1 --w 16 --h 8\n")
    with pytest.raises(ConfigError) as caught:
        start(sample_prompts=str(file))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        f"--sample_prompts, line {number}" for number in (2, 3, 4)
    ]
    file.write_text("3 --ss euler --l 2 --g 9\n")
    run, _ = start(sample_prompts=str(file))
    run.method.remove()
    (prompt,) = read_prompts(run.config, run.frozen)
    assert (prompt.sampler, prompt.scale) == ("euler", 2.0)
