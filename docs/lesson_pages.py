# SPDX-License-Identifier: Apache-2.0
"""A page for each lesson, from the words that `perceptriton lesson NAME` prints. Git ignores what this writes."""

from pathlib import Path

from perceptriton.mlp.lessons.catalogue import LESSONS

FOLDER = Path(__file__).parent / "lessons"


def page(lesson) -> str:
    options = [f"`--{count.name}`: {count.summary}, {count.default:,} unless told otherwise" for count in lesson.counts]
    options += [f"`--plot FILE.png`: {lesson.picture}"] if lesson.plot else []
    words = lesson.intro(**{count.name: count.default for count in lesson.counts})
    lines = [f"# {lesson.name}", "", f"{lesson.summary[0].upper()}{lesson.summary[1:]}.", ""]
    lines += ["```", f"perceptriton lesson {lesson.name}", "```", "", "````text", words, "````", ""]
    lines += ["Options:", "", *(f"- {option}" for option in options), ""] if options else []
    function = f".. autofunction:: perceptriton.mlp.lessons.{lesson.run.__name__}"
    lines += ["## From Python", "", "```{eval-rst}", function, "```", "", "[All lessons](../lessons.md)"]
    return "\n".join(lines) + "\n"


def write(app=None) -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, lesson in LESSONS.items():
        (FOLDER / f"{name}.md").write_text(page(lesson), encoding="utf-8")


def setup(app) -> dict:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
