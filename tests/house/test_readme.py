# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages of docs/ say can be done, done; and what they point at, there."""

import doctest
import json
import re
import runpy
from pathlib import Path

import pytest
import setuptools
import torch

import perceptriton.kernels
import perceptriton.mlp
from perceptriton.mlp.lessons.catalogue import LESSONS

ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README = TEXTS["README.md"]


def blocks(text):
    """(line number of its first line, code) of every python block."""
    return [
        (text[: found.start(1)].count("\n") + 1, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def run(line, code, name="README.md"):
    """Runs a block: one with prompts must print what it shows, any other has to end without an exception."""
    if not code.startswith(">>>"):
        exec(compile("\n" * (line - 1) + code, name, "exec"), {"__name__": "__main__"})
        return
    example = doctest.DocTestParser().get_doctest(code, {}, name, name, line - 1)
    said = []
    # The compiler, which has put names of its own among these, takes them away later.
    doctest.DocTestRunner(verbose=False).run(example, out=said.append, clear_globs=False)
    assert not said, "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line", "code"),
    [pytest.param(name, *block, id=f"{name}-{block[0]}") for name, text in TEXTS.items() for block in blocks(text)],
)
def test_every_block_runs(name, line, code, tmp_path, monkeypatch):
    if "perceptriton.mlp.estimator" in code:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.chdir(tmp_path)
    run(line, code, name)
    if "backend" in code:
        torch._dynamo.reset()  # which holds what the block defined


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


def test_the_readme_is_short():
    assert len(README.split()) <= 1300


# --- links -------------------------------------------------------------------------------------------------


def without_code(text):
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text):
    """Where links and pictures point, addresses aside."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [link for link in found if not re.match(r"https?:", link)]


def anchors(text):
    """What GitHub and MyST call the headings of a text."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path, text):
    """The links of the text in this file that lead nowhere."""
    found = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        there = target.exists() and target.resolve().is_relative_to(ROOT)
        held = text if target == path or not there else target.read_text(encoding="utf-8") if anchor else ""
        if not there or (anchor and anchor not in anchors(held)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", [*PATHS, ROOT / ".github" / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert broken(path, path.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    text = "# A-b, `c`\n[a](LICENSE) [b](#a-b-c) [c](https://x.y) ![d](no.png) [e](docs/limits.md#no) [f](#no) `[g](h)`"
    assert broken(ROOT / "README.md", text) == ["no.png", "docs/limits.md#no", "#no"]
    assert len(links(README)) > 20


@pytest.fixture
def metadata(monkeypatch):
    """What setup.py says of the package."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


def test_an_index_page_gets_addresses(metadata):
    description = metadata["long_description"]
    assert links(description) == []
    own = re.findall(rf"\]\({re.escape(metadata['url'])}/(blob|raw)/main/([^)#]+)", description)
    assert len(own) == len(links(README))
    assert all((ROOT / path).exists() for _, path in own)
    assert {kind for kind, path in own if path.endswith(".png")} == {"raw"}


def test_files_about_the_project_agree(metadata):
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {metadata['version']}\n" in citation
    assert f'\nrepository-code: "{metadata["url"]}"\n' in citation
    assert f"name: {metadata['author']}\n" in citation
    assert f"\n## {metadata['version']}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f'\nURL = "{metadata["url"]}"\n' in (ROOT / "docs" / "conf.py").read_text()
    forms = (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    addresses = {found for form in forms for found in re.findall(r"https:\S+", form.read_text())}
    assert all(address.startswith(f"{metadata['url']}/") for address in addresses)


# --- claims ------------------------------------------------------------------------------------------------

TABLE = re.compile(r"^<!-- table (\S+) begin -->\n.*?^<!-- table \1 end -->\n", re.MULTILINE | re.DOTALL)
RATIO = re.compile(r"(?<![\w.,-])\d(?:[\d.,]*\d)?x(?![\dA-Za-z])")


@pytest.mark.parametrize("name", TEXTS)
def test_speed_ups_are_written_by_the_report(name):
    said = RATIO.findall(without_code(TABLE.sub("", TEXTS[name])))
    assert set(said) <= {"1x"}, "benches/report.py writes figures, into tables between markers"


def test_a_figure_that_is_typed_in_is_found():
    text = "1.46x and 3,028x, but 128x128 and 0x1f\n<!-- table a begin -->\n| 2x |\n<!-- table a end -->\n"
    assert RATIO.findall(TABLE.sub("", text)) == ["1.46x", "3,028x"]


def test_the_readme_names_where_its_claims_come_from():
    for section in ("Status", "Measured"):
        (text,) = re.findall(rf"^## {section}\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
        (named,) = re.findall(r"<!-- (?:from|measured:) (.*?) -->", text)
        paths = re.findall(r"[\w/.*-]+\.(?:json|md)\b", named)
        assert paths
        for path in paths:
            assert any([*ROOT.glob(path), *(ROOT / "benches" / "results").glob(path)]), path


def test_the_status_is_what_has_been_recorded():
    results = [json.loads(path.read_text()) for path in (ROOT / "benches" / "results").glob("*.json")]
    ran = any(result.get("machine_info", {}).get("gpu") for result in results)
    launches = json.loads((ROOT / "kernels" / "tuned" / "launches.json").read_text())
    assert ("No GPU has run these kernels" in README) is not (ran or bool(launches["devices"]))


def test_lessons_are_those_of_the_command_line():
    page = TEXTS["docs/lessons.md"]
    listed = {
        name: options.split()
        for name, options in re.findall(r"^\| `([a-z-]+)` \|[^|]*\| `?((?:--\w+ ?)*)`? ?\|$", page, re.MULTILINE)
    }
    assert list(listed) == list(LESSONS)
    for name, lesson in LESSONS.items():
        assert listed[name] == [*(f"--{count.name}" for count in lesson.counts), *["--plot"] * bool(lesson.plot)], name
    named = {name for text in TEXTS.values() for name in re.findall(r"perceptriton lesson ([a-z-]+)", text)}
    assert named <= set(LESSONS)


def test_targets_of_make_exist():
    code = "".join(found for text in TEXTS.values() for found in re.findall(r"```\n.*?```|`[^`\n]+`", text, re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert {"run", "test", "cuda", "docs"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


# --- the site ----------------------------------------------------------------------------------------------


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^([a-z-]+)$", TEXTS["docs/index.md"], re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in PATHS[1:] if path.stem != "index")


def test_the_reference_holds_every_public_name():
    held = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]*\.)?(\w+)$", TEXTS["docs/reference.md"], re.MULTILINE))
    assert {*perceptriton.mlp.__all__, *perceptriton.kernels.__all__} - held == set()
