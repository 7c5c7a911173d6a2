"""Put files from outside docs/ on the site, so that the same links work there and in a repository browser.

A page links to a file of the repository by its relative path, for example `[LOG.md](../studies/LOG.md)`. Every file
that a page links to is added to the site at its path in the repository, and the links are rewritten to that place.
README.md, which MkDocs would take for the home page, is renamed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Pages from outside docs/ that the navigation names, whether or not another page links to them.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "studies/LOG.md")
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)")


def get_site_path(path: Path) -> str:
    """Return the place on the site of a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return "getting-started.md" if name == "README.md" else name


def find_linked_file(page: Path, link: str) -> Path | None:
    """Return the file of the repository that a link leads to, or None if there is no such file."""
    path = Path(os.path.normpath(page.parent / link))
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, and those that these link to in turn."""
    queue = [DOCS / file.src_uri for file in files.documentation_pages()] + [ROOT / name for name in PAGES]
    visited: set[Path] = set()
    while queue:
        path = queue.pop()
        if path in visited:
            continue
        visited.add(path)
        if not path.is_relative_to(DOCS):
            files.append(File.generated(config, get_site_path(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            links = LINK.findall(path.read_text(encoding="utf-8"))
            queue += [linked for link in links if (linked := find_linked_file(path, link))]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page from paths in the repository to paths on the site."""
    source = Path(page.file.abs_src_path or "")
    here = Path(page.file.src_uri).parent

    def rewrite(match: re.Match[str]) -> str:
        linked = find_linked_file(source, match[1])
        return Path(os.path.relpath(get_site_path(linked), here)).as_posix() if linked else match[1]

    return LINK.sub(rewrite, markdown)
