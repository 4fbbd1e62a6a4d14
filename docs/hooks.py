"""Pages of the site that lie elsewhere in the repository, and links that hold in both places.

Every Markdown file links as the repository has it, so that its links work on a page of the repository too. Here the
links to files that the site has are rewritten to where the site has them.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BORROWED = {path.name: path.name for path in ROOT.glob("*.md")} | {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks/about.md",  # an index would stand for the whole section in the navigation
}
"""Path in the repository → path in the site, for pages outside of docs/."""

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_CODE = re.compile(r"^(```.*?^```[^\n]*\n)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    results = [path for path in ROOT.glob("benchmarks/results/**/*") if path.suffix in (".md", ".png", ".json")]
    examples = [path for path in ROOT.glob("examples/*") if path.suffix in (".py", ".ipynb")]
    for path in [*map(ROOT.joinpath, BORROWED), *results, *examples]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, BORROWED.get(name, name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page, and leave out its comments, which set up samples for their test."""
    parts = _CODE.split(_COMMENT.sub("", markdown))
    here = page.file.src_uri
    return "".join(part if part.startswith("```") else _relinked(part, here, files) for part in parts)


def _relinked(text: str, here: str, files: Files) -> str:
    def site_link(match: re.Match[str]) -> str:
        opened, target, anchor = match[1], match[2], match[3] or ""
        if ":" in target:
            return match[0]
        wanted = _on_site(posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(here)), target)))
        if files.get_file_from_path(wanted) is None:
            return match[0]  # a broken link; the strict build says so
        return f"{opened}{posixpath.relpath(wanted, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(site_link, text)


def _in_repository(page: str) -> str:
    """Where a page of the site lies in the repository."""
    outside = {site: name for name, site in BORROWED.items()}
    return outside.get(page, page if page.startswith("benchmarks/") else f"docs/{page}")


def _on_site(path: str) -> str:
    """Where a file of the repository is on the site, if it is there."""
    return BORROWED.get(path, path.removeprefix("docs/"))
