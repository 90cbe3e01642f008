# SPDX-License-Identifier: Apache-2.0
"""The site of docs/: Sphinx with MyST and Furo, built by `make docs`. Nothing in it is fetched while it is read."""

import re
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "perceptriton"
author = "The perceptriton authors"
project_copyright = author
version = release = metadata.version("perceptriton")
URL = "https://github.com/perceptriton/perceptriton"

extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "lesson_pages"]
exclude_patterns = ["examples"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show defaults, and the texts say what arguments are
autodoc_preserve_defaults = True

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_title = f"perceptriton {version}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"source_repository": URL, "source_branch": "main", "source_directory": "docs/"}


def beyond(text: str, folder: str) -> str:
    """The text with links to files of the repository outside docs/ as links to the project's page.

    folder: what such links are relative to, seen from the repository's root: "" in README.md, "docs/" here.
    """

    def absolute(found: re.Match) -> str:
        path = (HERE.parent / folder / found[2]).resolve().relative_to(HERE.parent.resolve()).as_posix()
        return found[0] if path.startswith("docs/") else f"{found[1]}({URL}/blob/main/{path})"

    return re.sub(r"(?<!!)(\[(?:[^\[\]]|\[[^\[\]]*\])*\])\((?!https?:|#)([^)#]+)\)", absolute, text)


def read(app, name: str, content: list[str]) -> None:
    content[0] = beyond(content[0], "docs")


def include(app, path: Path, parent: str, content: list[str]) -> None:
    if path.name == "README.md":
        content[0] = beyond(content[0], "")


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("include-read", include)
