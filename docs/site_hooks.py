"""Hooks of MkDocs: a notebook becomes a page of its text, its code and its printed output."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Put a Markdown page in the place of each notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(Path(file.abs_src_path).read_text("utf-8"))
        files.remove(file)
        name = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, name, content=as_markdown(notebook)))
    return files


def on_config(config: Any) -> Any:
    """The navigation names notebooks by their files; their pages end in `.md`."""
    config["nav"] = _pages(config["nav"])
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links name notebooks and files of the repository, where the site has pages and no files."""
    folder = Path(page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if os.path.normpath(folder / target).startswith(".."):
            return text
        return f"[{text}]({target.removesuffix('.ipynb')}.md)" if ".ipynb" in target else found[0]

    return re.sub(r"\[([^\]]+)\]\(([^)\s:#]+)\)", link, markdown)


def as_markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook one after the other."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _pages(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_pages(part) for part in entry]
    if isinstance(entry, dict):
        return {title: _pages(part) for title, part in entry.items()}
    return entry.removesuffix(".ipynb") + ".md" if entry.endswith(".ipynb") else entry
