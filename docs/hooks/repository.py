"""Files of the repository as pages of the site, for the pages of docs/ that link to them.

The pages are written to be read on GitHub, too, so a link says where a file is in the repository. Here the file becomes
a page of the site, Markdown as it is and code as a block, and the link goes to that page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# What lies outside docs/ and has a page on the site.
FROM_THE_REPOSITORY = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "action.yml",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "ci/gitlab/*.yml",
    "examples/**/*.py",
    "examples/**/*.yaml",
)
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml"}
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the repository's files as pages under the path that they have in the repository."""
    for pattern in FROM_THE_REPOSITORY:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in LANGUAGES:
                text = path.read_text(encoding="utf-8")
                code = f"# {name}\n\n````{LANGUAGES[path.suffix]}\n{text}````\n"
                files.append(File.generated(config, f"{name}.md", content=code))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links as they work in the repository into links between pages."""
    source = page.file.src_uri
    outside = page.file.generated_by is not None
    folder = posixpath.dirname(source if outside else f"docs/{source}")

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        for candidate in (target.removeprefix("docs/"), f"{target}.md"):
            if files.get_file_from_path(candidate):
                relative = posixpath.relpath(candidate, posixpath.dirname(source) or ".")
                return f"{match[1]}{relative}{match[3] or ''}{match[4]}"
        return match[0]

    return LINK.sub(rewritten, markdown)
