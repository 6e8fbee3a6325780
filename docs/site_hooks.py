"""What `make docs` adds to mkdocs: README.md as the first page, and a reference of every public name.

Pages are written for a reader on GitHub, so their links go to files of the repository. In the site those to pages stay
links; those to other files become links to the repository where `repo_url` is set, else plain words.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)


def public_names() -> list[str]:
    """`__all__` of the package, without importing it."""
    for node in ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    raise ValueError("__init__.py has no __all__")


def on_files(files: Any, config: Any) -> Any:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    reference = "# Reference\n\nEvery public name: `from mimic_el import ...`.\n\n"
    reference += "\n\n".join(f"::: mimic_el.{name}" for name in public_names()) + "\n"
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "reference.md", content=reference))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/, in all but blocks of code."""
    base = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"

    def link(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if image or re.match(r"[a-z]+:|#", target) or files.get_file_from_path(target.partition("#")[0]):
            return match[0]
        path = (base / target.partition("#")[0]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]  # mkdocs says that it is broken
        if not config.repo_url:
            return words
        return f"[{words}]({config.repo_url.rstrip('/')}/blob/HEAD/{path.relative_to(ROOT).as_posix()})"

    parts = FENCE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(parts))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """transformers' way to name a thing in a docstring, [`Name`], as a link of the reference."""
    if page.file.src_uri != "reference.md":
        return html
    known = set(public_names())

    def name(match: re.Match[str]) -> str:
        target = match[1].partition(".")[0]
        code = f"<code>{match[1]}</code>"
        return f'<a href="#mimic_el.{match[1]}">{code}</a>' if target in known else code

    return re.sub(r"\[<code>~?([\w.]+)</code>\]", name, html)
