"""Hook of mkdocs.yml: what the site has beside the pages of docs/.

README is the front page, CONTRIBUTING and CHANGELOG are pages, and the API has a page for each room of public names. Links to
other files of the repository lead to copies of them, so that the site needs no network and strict checks see every link.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_TITLES = {
    "analysis": "Analysis",
    "conditions": "Conditions",
    "contract": "Words as types",
    "data": "Data",
    "diffusion": "Noise processes",
    "editing": "Plans and grafts",
    "errors": "Errors",
    "evaluation": "Evaluation",
    "hosts": "Hosts",
    "latents": "Latents",
    "metrics": "Metrics",
    "models": "Models",
    "operators": "Operators",
    "report": "Reports",
    "runs": "Recipes and runs",
    "sampling": "Sampling",
    "training": "Training",
    "weights": "Models on disk",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    assert config.nav is not None
    config.nav.append({"API": [{_TITLES[room]: f"api/{room}.md"} for room in _rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text(), source, page)))
    for room, names in _rooms().items():
        body = "\n\n".join(map(_documented, names))
        files.append(File.generated(config, f"api/{room}.md", content=f"# {_TITLES[room]}\n\n{body}\n"))
    for file in list(files.documentation_pages()):
        for target in _outside(file.content_string, file.src_uri) - PAGES.keys():
            if files.get_file_from_path(f"files/{target}") is None:
                files.append(File.generated(config, f"files/{target}", content=(ROOT / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/, led to pages or to copies."""
    for target in _outside(markdown, page.file.src_uri):
        here = PurePosixPath(page.file.src_uri).parent
        there = PAGES.get(target, f"files/{target}")
        markdown = re.sub(
            rf"(\]\()[^)\s#]*{re.escape(target)}((?:#[^)\s]*)?\))",
            rf"\g<1>{relpath(there, here)}\2",
            markdown,
        )
    return markdown


def _documented(name: str) -> str:
    """The lines that mkdocstrings replaces by a public name's documentation."""
    heading = f"grafting.{name.rpartition('.')[2]}"
    return f"::: grafting.{name}\n    options: {{heading: {heading}, toc_label: {heading}}}"


def _moved(markdown: str, source: str, page: str) -> str:
    """A page of the repository's root as one of docs/: its links, as they are seen from there."""

    def moved(link: re.Match[str]) -> str:
        target = link[2]
        if "://" in target or not (ROOT / target).exists():
            return link[0]
        inside = target.removeprefix("docs/")
        return f"{link[1]}{inside if inside != target else f'../{target}'}{link[3]}"

    return _LINK.sub(moved, markdown)


def _outside(markdown: str, page: str) -> set[str]:
    """Files of the repository, beside docs/, that a page links to."""
    found = set()
    for link in _LINK.finditer(markdown):
        target = normpath(f"docs/{PurePosixPath(page).parent}/{link[2]}")
        is_outside = not target.startswith(("docs/", "../"))
        if "://" not in link[2] and is_outside and (ROOT / target).is_file():
            found.add(target)
    return found


def _rooms() -> dict[str, list[str]]:
    """Public names by room, each as the module that defines it says."""
    stub = ast.parse((ROOT / "src/grafting/__init__.pyi").read_text())
    rooms: dict[str, list[str]] = defaultdict(list)
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            room = node.module.partition(".")[0]
            rooms[room] += [f"{node.module}.{alias.name}" for alias in node.names]
    return dict(sorted(rooms.items()))
