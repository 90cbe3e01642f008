"""Docstrings of this package are plain text with names in backticks. Here they become reStructuredText for Sphinx."""

import re


def restructured(lines: list[str]) -> list[str]:
    """Names in backticks become code, all else is taken as it stands; an indented part stays a part of its own."""
    text = "\n".join(lines).expandtabs()
    parts = re.split(r"(`[^`\n]+`)", text)
    found = [f"`{part}`" if i % 2 else re.sub(r"([*_|\\])", r"\\\1", part) for i, part in enumerate(parts)]
    # Paragraphs of arguments follow each other line by line: "name: what it is". Each gets a line of its own.
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", "".join(found)):
        body = re.sub(r"(?m)^[ ]+", "", paragraph)
        paragraphs.append(re.sub(r"(?m)^((?:\w|\\_|, )+: )", r"| \1", body) if _listed(body) else body)
    return "\n\n".join(_wrapped(paragraph) for paragraph in paragraphs).split("\n")


def _listed(paragraph: str) -> bool:
    return re.match(r"(?:\w|\\_|, )+: ", paragraph) is not None


def _wrapped(paragraph: str) -> str:
    """Lines that go on with a line of a line block are indented, as reStructuredText wants it."""
    lines = paragraph.split("\n")
    if not lines[0].startswith("| "):
        return paragraph
    return "\n".join(line if line.startswith("| ") else f"  {line}" for line in lines)


def process(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
