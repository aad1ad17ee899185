"""Make the pages of the site that are generated: the front page, the Python and command references.

mkdocs calls these functions; `mkdocs.yml` names this file.
"""

import contextlib
import io
import logging
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

import hcp_jax
from hcp_jax import cli

_log = logging.getLogger("mkdocs.hooks")

ROOT = pathlib.Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name under "Use it"."""
    named = str(config.nav)
    others = [p.name for p in sorted(pathlib.Path(config.docs_dir).glob("*.md"))]
    [pages] = (section["Use it"] for section in config.nav if "Use it" in section)
    pages += [name for name in others if f"'{name}'" not in named]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in (("index", front()), ("api", api()), ("commands", commands())):
        files.append(File.generated(config, f"{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to files that are not of the site into their names."""
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Warn, which ends a strict build, of examples that are shown as quotations."""
    if page.file.src_uri == "api.md" and "<blockquote>" in html:
        _log.warning("the reference shows an example of a docstring as a quotation.")


def front() -> str:
    """Return the README, with links as the site has them."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    text = re.sub(r"\[docs/([\w-]+)\.md\]", r"[\1]", text)  # pages are named without folder here
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#|[\w-]+\.(?:md|png))[^)]*\)", r"\1", text)


def api() -> str:
    """Return a page with every public name."""
    rooms = [name for name, home in hcp_jax._HOME.items() if home == f"hcp_jax.{name}"]
    names = [f"::: {home}.{name}" for name, home in hcp_jax._HOME.items() if name not in rooms]
    for room in rooms:
        names.append(f"::: hcp_jax.{room}\n    options: {{members: false}}")
        inside = getattr(hcp_jax, room)._HOME
        names += [f"::: {home}.{name}" for name, home in inside.items()]
    return "\n\n".join(["# Python", "`import hcp_jax as hcp`", *names])


def commands() -> str:
    """Return a page with the help of every command; that of train lists all config keys."""
    parts = ["# Commands", "Keys of a config are options of `hcp train`: `model.num_layers: 4` is "]
    parts[-1] += "`--model.num_layers 4`."
    for name in cli.COMMANDS:
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            cli.main([name, "--help"])
        parts += [f"## hcp {name}", f"```text\n{told.getvalue().strip()}\n```"]
    return "\n\n".join(parts)
