# SPDX-License-Identifier: Apache-2.0
"""Docstrings of this package are plain text with names in backticks. Here they become reStructuredText for Sphinx."""

import inspect
import re

ARGUMENTS = re.compile(r"(?m)(^|(?<=[.;)\]] ))(\w+(?:, \w+)*): ")


def restructured(lines: list[str], names: set[str]) -> list[str]:
    """Names in backticks become code, arguments (`names`) that are explained bold; all else is taken as it stands."""

    def bold(found: re.Match) -> str:
        return f"\x02{found[2]}\x02: " if {*found[2].split(", ")} <= names else found[0]

    parts = re.split(r"(`[^`\n]+`)", "\n".join(lines).expandtabs())
    text = "".join(
        f"`{part}`" if i % 2 else re.sub(r"([*_|\\])", r"\\\1", ARGUMENTS.sub(bold, part))
        for i, part in enumerate(parts)
    )
    return "\n\n".join(map(paragraph, re.split(r"\n\s*\n", text))).replace("\x02", "**").split("\n")


def paragraph(text: str) -> str:
    """One paragraph without indentation. Where its lines begin with arguments, each of them begins a line."""
    lines = [line.strip() for line in text.split("\n")]
    if not lines[0].startswith("\x02"):
        return "\n".join(lines)
    return "\n".join(f"| {line}" if line.startswith("\x02") else f"  {line}" for line in lines)


def process(app, what, name, obj, options, lines: list[str]) -> None:
    try:
        names = {*inspect.signature(obj).parameters}
    except (TypeError, ValueError):
        names = set()
    lines[:] = restructured(lines, names)


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
