"""What the README says can be done, done."""

import doctest
import re
from pathlib import Path

import pytest

from perceptriton.mlp.lessons.catalogue import LESSONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text):
    """(line number of its first line, code) of every python block."""
    return [
        (text[: found.start(1)].count("\n") + 1, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def run(line, code):
    """Runs a block: one with prompts must print what it shows, any other has to end without an exception."""
    if not code.startswith(">>>"):
        exec(compile("\n" * (line - 1) + code, "README.md", "exec"), {"__name__": "__main__"})
        return
    example = doctest.DocTestParser().get_doctest(code, {}, "README.md", "README.md", line - 1)
    said = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not said, "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "code"), [pytest.param(*block, id=f"line-{block[0]}") for block in blocks(README)])
def test_every_block_runs(line, code, tmp_path, monkeypatch):
    if "perceptriton.mlp.estimator" in code:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.chdir(tmp_path)
    run(line, code)


WRONG = {
    "exception": "x = 1\nx.no_such_thing\n",
    "failed-assertion": "assert 1 == 2\n",
    "other-output": ">>> 1 + 1\n3\n",
    "prompt-that-raises": ">>> 1 / 0\n",
}


@pytest.mark.parametrize("code", WRONG.values(), ids=WRONG)
def test_a_wrong_block_is_found(code):
    ((line, found),) = blocks(f"Text.\n\n```python\n{code}```\n\n```\nnot python\n```\n")
    assert (line, found) == (4, code)
    with pytest.raises((AssertionError, AttributeError)):
        run(line, found)


def test_lessons_are_those_of_the_command_line():
    listed = {
        name: options.split()
        for name, options in re.findall(r"^\| `([a-z-]+)` \|[^|]*\| `?((?:--\w+ ?)*)`? ?\|$", README, re.MULTILINE)
    }
    assert list(listed) == list(LESSONS)
    for name, lesson in LESSONS.items():
        assert listed[name] == [*(f"--{count.name}" for count in lesson.counts), *["--plot"] * bool(lesson.plot)], name
    assert set(re.findall(r"perceptriton lesson ([a-z-]+)", README)) - {"NAME"} <= set(LESSONS)


def test_targets_of_make_exist():
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "".join(re.findall(r"```\n.*?```|`[^`\n]+`", README, re.DOTALL))))
    assert {"run", "test", "cuda"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
