"""Prompts: the paper's lists and files of one's own."""

import pytest

from sd.prompts import PROMPTS, load_prompts
from toy.emoji_sd import render


def test_the_prompts_are_those_of_the_papers_appendix():
    assert load_prompts("animals") is PROMPTS["animals"]
    assert len(set(PROMPTS["animals"])) == 45 and "an ant" in PROMPTS["animals"]
    assert load_prompts("hand") == ["1 hand"]
    assert len(set(load_prompts("unsafe"))) == 14


def test_the_animals_are_those_that_the_emoji_model_was_trained_on():
    assert PROMPTS["animals"] == [render.caption(name) for name in render.NAMES]


def test_a_file_has_one_prompt_a_line_and_blank_lines_are_none(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n a blue cat \n\nKätzchen\n", encoding="utf-8")
    assert load_prompts(str(file)) == ["a blue cat", "Kätzchen"]


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\xfa"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="--prompts .*p.txt"):
        load_prompts(str(file))
