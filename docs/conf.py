"""How the pages of this folder become a site: ``make docs``, or ``sphinx-build -W -b html docs build/docs``.

The pages are written to be read as they are, too: links between them are paths of files, and nothing in them is for
Sphinx alone but the table of contents of index.md. Links to other files of the repository become downloads.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from idml._version import __version__

project, author = "IDML", "The IDML authors"
release = version = __version__
extensions = ["myst_nb"]
nitpicky = True

html_theme = "furo"
html_title = f"IDML {version}"
html_show_sourcelink = html_show_copyright = False

# Anchors of headings, made as code hosts make them: links to a part of a page are to these.
myst_heading_anchors = 4
# The notebook is shown as it was stored; tests/test_docs.py runs it.
nb_execution_mode = "off"
# Straight quotes and two hyphens are meant as they are: pages are full of options.
smartquotes = False


def setup(app: Any) -> None:
    """The README is no page of the site: what links to it there becomes plain text here."""

    def without_readme(_app: Any, _page: str, source: list[str]) -> None:
        source[0] = re.sub(r"\[([^\]]*)\]\((?:\.\./)+README\.md(?:#[^)]*)?\)", r"\1", source[0])

    app.connect("source-read", without_readme)
