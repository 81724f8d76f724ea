"""What mkdocs adds to docs/: pages of the README, notebooks, docstrings and tables, and of files that pages link to.

A link in Markdown names a file of the repository, so that it works in an editor and on a code host. Here each such link
is turned into one to the page of that file. A file outside docs/ gets a page that shows its text.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import notebook_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import rooflama
from rooflama import kernels, models
from rooflama.kernel_card import CARDS, KernelCard
from rooflama.kernels.kernel import Kernel
from rooflama.loaders import device
from rooflama.roofline import measurements, save_picture

LOG = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
SHOWN_AS = {".py": "python", ".toml": "toml", ".csv": "text", ".yml": "yaml", ".json": "json"}
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


@event_priority(100)  # before mkdocstrings, which leaves out a folder that is not there yet
def on_config(config: MkDocsConfig) -> None:
    """Lay the packages out as they are installed, for the reader of docstrings; list guides, notebooks and kernels."""
    listed = str(config.nav)
    sections = {next(iter(section)): section for section in config.nav}
    sections["Guides"]["Guides"] += [p.name for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in listed]
    sections["Notebooks"]["Notebooks"] += [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]
    sections["Kernels"]["Kernels"] += [f"kernels/{name}.md" for name in CARDS]
    package = BUILD / "docs" / "rooflama"
    package.mkdir(parents=True, exist_ok=True)
    for source in (*(ROOT / "rooflama").iterdir(), *(ROOT / room for room in ("kernels", "loaders", "models"))):
        link = package / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page that is not in docs/."""

    def add(uri: str, content: str, inclusion: InclusionLevel = InclusionLevel.UNDEFINED) -> None:
        files.append(File.generated(config, uri, content=content, inclusion=inclusion))

    for source, uri in ROOT_PAGES.items():
        add(uri, (ROOT / source).read_text(encoding="utf-8"))
    for notebook in NOTEBOOKS:
        add(f"notebooks/{notebook.stem}.md", notebook_pages.markdown(notebook))
    add("notebooks/index.md", notebook_pages.index(NOTEBOOKS))
    add("kernels/index.md", _kernels())
    for uri, text in _api().items():
        add(uri, text)
    for name, picture in _kernel_pictures().items():
        files.append(File.generated(config, f"kernels/{name}.svg", abs_src_path=str(picture)))
    for uri, text in _linked(files.documentation_pages()).items():
        add(uri, text, InclusionLevel.NOT_IN_NAV)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages, and show the picture of a kernel above its card."""
    uri = page.file.src_uri
    if re.fullmatch(r"kernels/(?!index)\w+\.md", uri) and files.get_file_from_path(uri.replace(".md", ".svg")):
        name = Path(uri).stem
        title, rest = markdown.split("\n", 1)
        alt = f"Fraction of the roofline of each measured case of {name}"
        markdown = f"{title}\n\n![{alt}]({name}.svg)\n{rest}"
    here = _repository_path(uri)
    return LINK.sub(lambda match: _relative(uri, _page_of(here.parent / match[1], match[1])), markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of each link, picture and anchor of the built pages that leads nowhere; warnings fail a strict build."""
    site = Path(config.site_dir)
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    anchors = {path: {*re.findall(r'\bid="([^"]+)"', text)} for path, text in texts.items()}
    for path, text in texts.items():
        for link in {*re.findall(r'(?:href|src)="([^"]+)"', text)}:
            if re.match(r"\w+:", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = Path(os.path.normpath(path.parent / file)) if file else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                LOG.warning("%s links to %s, which does not exist", path.relative_to(site), link)


def _repository_path(uri: str) -> Path:
    """The file that a page shows, or the place in docs/ where a generated page would be."""
    for source, page in ROOT_PAGES.items():
        if page == uri:
            return ROOT / source
    if uri.startswith("notebooks/"):
        return ROOT / uri
    if uri.startswith("source/"):
        return ROOT / uri.removeprefix("source/").removesuffix(".md")
    return ROOT / "docs" / uri


def _page_of(target: Path, link: str) -> str:
    """The page, relative to docs/, of a file of the repository."""
    target = Path(os.path.normpath(target))
    if not target.is_relative_to(ROOT):
        return link
    path = target.relative_to(ROOT).as_posix()
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path == "notebooks" or path.endswith(".ipynb"):
        return path.replace(".ipynb", ".md") if target.is_file() else "notebooks/index.md"
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return f"{inside}/index.md" if target.is_dir() else inside
    return f"source/{path}/index.md" if target.is_dir() else f"source/{path}.md"


def _relative(page: str, target: str) -> str:
    return os.path.relpath(target, os.path.dirname(page) or ".")


def _linked(pages: Iterable[File]) -> dict[str, str]:
    """A page for each file outside docs/ that a page links to; for a folder, also for the text files in it."""
    wanted: dict[str, Path] = {}
    for page in pages:
        here = _repository_path(page.src_uri)
        for link in LINK.findall(page.content_string):
            target = Path(os.path.normpath(here.parent / link))
            if target.exists() and (uri := _page_of(target, link)).startswith("source/"):
                inside = sorted(target.iterdir()) if target.is_dir() else []
                wanted |= {_page_of(file, ""): file for file in inside if file.suffix in {*SHOWN_AS, ".md"}}
                wanted[uri] = target
    return {
        uri: _source_page(path, [file for file in wanted.values() if file.parent == path])
        for uri, path in wanted.items()
    }


def _source_page(path: Path, files: list[Path]) -> str:
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return "\n".join([f"# {name}", "", *(f"- [{file.name}]({file.name})" for file in files)])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {name}\n\n`````{SHOWN_AS.get(path.suffix, 'text')}\n{text}\n`````\n"


def _kernels() -> str:
    lines = [
        "# Kernels",
        "",
        "One page per file of `kernels/`, written from its code, its tests and its measurements.",
        "",
    ]
    for name, functions in CARDS.items():
        about = KernelCard(name).to_dict()["about"][0].split("\n\n")[0].replace("\n", " ")
        lines.append(f"- [{name}]({name}.md): {about} Functions: {', '.join(f'`{one}`' for one in functions)}.")
    return "\n".join(lines) + "\n"


def _kernel_pictures() -> dict[str, Path]:
    """A picture of each measured kernel: every case against its roofline."""
    cases = measurements()
    pictures = {}
    folder = BUILD / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name in CARDS:
        if own := [case for case in cases if case.kernel == name]:
            save_picture(own, folder / f"{name}.svg")
            pictures[name] = folder / f"{name}.svg"
    return pictures


def _api() -> dict[str, str]:
    """One page per package, with the docstring of every public name."""
    kernel_names = {name for name in kernels.__all__ if isinstance(getattr(kernels, name), Kernel)}
    pages: dict[str, tuple[ModuleType, str]] = {
        "api/index.md": (rooflama, "What users import."),
        "api/models.md": (models, f"{models.__doc__}"),
        "api/loaders.md": (device, "[The device boundary](../DEVICE_BOUNDARY.md)."),
        "api/kernels.md": (kernels, "Each kernel has [a page of its own](../kernels)."),
    }
    folders = {"testing": "For tests of your own kernels.", "integrations": "[Integrations](../INTEGRATIONS.md)."}
    texts, shown = {}, set()
    for uri, (package, about) in pages.items():
        names = [name for name in package.__all__ if package is not kernels or name not in kernel_names]
        objects = (getattr(package, name) for name in names)
        homes = [f"{one.__module__}.{one.__qualname__}" for one in objects if hasattr(one, "__qualname__")]
        homes = [home for home in homes if home not in shown]  # each name on the first page that offers it
        shown |= {*homes}
        texts[uri] = "\n\n".join([f"# {package.__name__}", about, *(f"::: {home}" for home in homes)]) + "\n"
    for name, about in folders.items():
        files = sorted((ROOT / "rooflama" / name).glob("[a-z]*.py"))
        modules = (f"::: rooflama.{name}.{path.stem}" for path in files)
        texts[f"api/{name}.md"] = "\n\n".join([f"# rooflama.{name}", about, *modules]) + "\n"
    return texts
