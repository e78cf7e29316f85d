"""Hooks of the documentation site: pages from outside docs/, their links, and all commands.

The README, the changes and other files outside docs/ are read where they are, so that each fact has
one place and links work on GitHub. A relative link to a file that is no page of the site becomes
plain text; a picture outside docs/ is copied.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from rich.text import Text

from sparse_optim.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
# File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
COMMANDS = "reference/commands.md"
PICTURES = "bench/results/*.png"
LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
LIST = re.compile(r"^((?!- ).+\n)(- )", re.MULTILINE)  # Markdown wants a blank line before it
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside docs/, and the page of the commands."""
    text = "\n".join(["# Commands", *describe(typer.main.get_command(app), "sparse-optim")])
    files.append(File.generated(config, COMMANDS, content=text))
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for picture in sorted(ROOT.glob(PICTURES)):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site; leave the text alone of links that have none."""
    sources = {page: source for source, page in PAGES.items()}
    source = ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def resolve(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.group(1), link.group(2), link.group(3), link.group(4)
        path = (source.parent / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return link.group()  # the strict build complains
        name = path.relative_to(ROOT).as_posix()
        uri = PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text
        relative = os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({relative}{anchor or ''})"

    parts = FENCE.split(markdown)  # text and code in turn
    parts[::2] = [LINK.sub(resolve, part) for part in parts[::2]]
    return "".join(parts)


def describe(command: Any, name: str) -> Iterator[str]:
    """A command's help as Markdown: a heading, the text, a table of the options; then its own."""
    if not hasattr(command, "commands"):
        text = Text.from_markup(command.help.replace("\b", "")).plain
        text = LIST.sub("\\1\n\\2", text)
        yield f"\n## {name}\n\n{text}\n"
        yield "| argument or option | what |\n| :-- | :-- |"
        for param in command.params:
            if param.name == "help":
                continue
            given = [f"`{given}`" for given in (*param.opts, *param.secondary_opts)]
            shown = ", ".join(given) if given[0].startswith("`-") else f"`{param.name.upper()}`"
            text = " ".join([param.help or "", *remarks(param)]).strip().replace("|", "\\|")
            yield f"| {shown} | {text} |"
    for part, inner in getattr(command, "commands", {}).items():
        yield from describe(inner, f"{name} {part}")


def remarks(param: Any) -> Iterator[str]:
    """The values that an argument or option allows, and its default: sentences after its help."""
    kind = getattr(param, "type_descriptor", None) or param.type  # typer from 0.29 on, and before
    choices = getattr(kind, "choices", None)
    if choices:
        yield f"Values: {', '.join(f'`{choice}`' for choice in choices)}."
    default = param.default
    if isinstance(default, bool):
        if param.secondary_opts:
            yield f"Default: `{(param.opts if default else param.secondary_opts)[0]}`."
    elif isinstance(default, (str, int, float)):
        yield f"Default: {default}."
