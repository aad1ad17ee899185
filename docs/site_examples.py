"""Show the examples of docstrings as code in the reference; `mkdocs.yml` names this file.

Docstrings end with `>>> ` lines, which Markdown would take for quotations within quotations.
"""

import re
import textwrap
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Puts the examples at the end of each docstring under the heading that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = under_heading(obj.docstring.value)


def under_heading(text: str) -> str:
    """Return a docstring with its examples in a section of their own."""
    found = re.search(r"(?:^|\n)(>>> .*)\Z", text, re.S)
    if found is None:
        return text
    return f"{text[: found.start()].rstrip()}\n\nExamples:\n{textwrap.indent(found[1], '    ')}"
