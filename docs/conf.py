"""The manual as a site: `make docs`.

The source folder is the project's root, so that one relative link works on the forge and in the site: README.md, what stands
beside it, and the pages of docs/. A link to any other file of the project becomes a download of it. Nothing is fetched, here or
by a reader's browser: no other project's index, fonts and scripts of the theme only.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.docs import FORMULAS_HERE, SYMBOLS_HERE, formulas, symbols  # noqa: E402  # found by the line before

project = "kablate"
author = "kablate contributors"
copyright = "kablate contributors, MIT licence"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md"]
exclude_patterns = [".*", "_site", "data", "defconfigs", "gpt2", "lib", "runs", "scripts", "test_matrix_results", "tests",
                    "wandb", "**/__pycache__"]

myst_heading_anchors = 4
myst_links_external_new_tab = False
# Words on a page that a reader of a site takes for code are code, not quotes to be made pretty.
smartquotes = False

html_theme = "furo"
html_title = "kablate"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True, "footer_icons": []}
html_static_path = ["_static"]
html_css_files = ["manual.css"]
# Tables that programs write, and what stands in committed reports, begin where the program that prints them does.
suppress_warnings = ["myst.header"]


def fill_in(app: Any, docname: str, source: list[str]) -> None:
    """Put what is known only of this tree into the page that has a place for it."""
    for place, made in ((SYMBOLS_HERE, symbols), (FORMULAS_HERE, formulas)):
        if place in source[0]:
            source[0] = source[0].replace(place, made())


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True}
