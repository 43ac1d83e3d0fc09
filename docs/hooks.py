"""Hooks of MkDocs: parameter tables from the help texts of the configurations, and links to files outside of docs/.

A page names parameters between `<!-- parameters -->` and `<!-- /parameters -->`, as `` `kl_coef`, `gamma` ``. The site
shows a table of their defaults and help texts instead of the names, so no page repeats a help text.

A page may link to any file of the repository, as `../benchmarks/results/demo.json`. The site gets a copy of each such
file in `repository/`, and of the files to which the copies link in turn.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = re.compile(r"<!-- parameters -->(.*?)<!-- /parameters -->", re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"'\s>]+")
COPIES = "repository"


def own_fields(config: type) -> list[str]:
    """Return the fields that a configuration declares or takes from a mixin of this package, in that order."""
    classes = [cls for cls in config.__mro__ if cls.__module__.startswith("ppo_plus.")]
    names = {name: None for cls in classes for name in vars(cls).get("__annotations__", {})}
    return [name for name in names if name in {field.name for field in dataclasses.fields(config)}]


def parameter_names(text: str, config: type) -> list[str]:
    """Return the names of the parameters that a text shows in its tables; `all` means `own_fields`."""
    blocks = PARAMETERS.findall(text)
    return [n for b in blocks for n in (own_fields(config) if b.strip() == "all" else re.findall(r"`(\w+)`", b))]


def parameter_table(names: list[str], config: Any) -> str:
    """Return a Markdown table with default and help text of fields of a configuration class."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    rows = [f"| `{n}` | `{fields[n].default!r}` | {_escape(fields[n].metadata['help'])} |" for n in names]
    return "\n".join(["| parameter | default | meaning |", "|---|---|---|", *rows])


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def link_target(page: str, link: str) -> str:
    """Return the file to which a relative link of a page leads, as a path from the repository root.

    A link to a folder leads to its README.md.
    """
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    readme = f"{target}/README.md"
    return readme if (ROOT / readme).is_file() else target


def site_path(file: str) -> str:
    """Return the site's path of a repository file: pages of docs/ at the top, all others in `repository/`."""
    return file.removeprefix("docs/") if file.startswith("docs/") else f"{COPIES}/{file}"


def rewrite_links(text: str, page: str) -> str:
    """Rewrite the relative links of a page to the site's paths of their files.

    Args:
        text: Markdown.
        page: its path from the repository root.
    """

    def rewrite(match: re.Match) -> str:
        target = link_target(page, match[2])
        if not (ROOT / target).is_file():
            return match[0]  # mkdocs reports it
        folder = posixpath.dirname(site_path(page))
        return f"{match[1]}{posixpath.relpath(site_path(target), folder or '.')}{match[3] or ''}"

    return LINK.sub(rewrite, text)


def linked_files(pages: list[str]) -> list[str]:
    """Return the files outside of docs/ that pages link to, directly or by a Markdown file that they link to."""
    files: dict[str, None] = {}
    pages = list(pages)
    for page in pages:  # grows
        for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
            target = link_target(page, match[2])
            if target.startswith("docs/") or target in files or not (ROOT / target).is_file():
                continue
            files[target] = None
            if target.endswith(".md"):
                pages.append(target)
    return [*files]


def on_files(files: Any, config: Any) -> Any:
    """Add the linked files of the repository to the site."""
    from mkdocs.structure.files import File

    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for file in linked_files(pages):
        content: str | bytes = (ROOT / file).read_bytes()
        if file.endswith(".md"):
            content = rewrite_links((ROOT / file).read_text(encoding="utf-8"), file)
        files.append(File.generated(config, site_path(file), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in parameter tables and rewrite the links of a page of docs/."""
    if page.file.generated_by is not None:
        return markdown
    markdown = rewrite_links(markdown, f"docs/{page.file.src_uri}")
    if not PARAMETERS.search(markdown):
        return markdown
    sys.path.insert(0, str(ROOT))
    from ppo_plus import PPOConfig

    return PARAMETERS.sub(lambda match: parameter_table(parameter_names(match[0], PPOConfig), PPOConfig), markdown)


def on_post_build(config: Any) -> None:
    """Refuse a site whose pages load anything from another host."""
    from mkdocs.exceptions import PluginError

    for page in Path(config.site_dir).rglob("*.html"):
        if match := LOADED.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page} loads a file from another host: {match[0]}")
