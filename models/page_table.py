"""Which page belongs to whom, at one moment: a picture of a page pool for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rooflama.kernels.facts import PALETTE, element, tint

from .kv_cache import PagedKVCache

PAGES_PER_LINE = 32


@dataclass(frozen=True)
class PageTable:
    """A snapshot of the pages that sequences hold.

    Attributes:
        page_size: tokens per page.
        lengths: name of a sequence -> its tokens.
        pages: name of a sequence -> its pages, in the order of its tokens.
        references: of each page of the pool, the number of sequences that hold it.
    """

    page_size: int
    lengths: dict[str, int]
    pages: dict[str, tuple[int, ...]]
    references: tuple[int, ...]

    @classmethod
    def of(cls, cache: PagedKVCache, sequences: Mapping[str, int]) -> PageTable:
        """The pages of ``sequences``: a name to show -> the id in ``cache``."""
        return cls(
            cache.page_size,
            {name: cache.length(number) for name, number in sequences.items()},
            {name: cache.pages(number) for name, number in sequences.items()},
            tuple(cache.pool.references),
        )

    @property
    def owners(self) -> list[list[str]]:
        """For each page of the pool, the names of the sequences that hold it."""
        return [[name for name, held in self.pages.items() if page in held] for page in range(len(self.references))]

    def describe(self, name: str) -> str:
        """One sequence in words."""
        length, held = self.lengths[name], self.pages[name]
        unused = max(0, len(held) * self.page_size - length)
        shared = sum(self.references[page] > 1 for page in held)
        return f"{length} tokens in {len(held)} pages, {shared} of them shared, {unused} slots unused"

    @property
    def summary(self) -> str:
        free = self.references.count(0)
        return f"{len(self.references)} pages of {self.page_size} tokens, {free} free"

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        yield Text(self.summary, style="bold")
        table = Table("sequence", "pages", "", box=None, padding=(0, 2, 0, 0))
        for place, name in enumerate(self.pages):
            colour = PALETTE[place % len(PALETTE)]
            pages = Text(" ").join(
                Text(str(page), style=f"{colour}{' underline' if self.references[page] > 1 else ''}")
                for page in self.pages[name]
            )
            table.add_row(Text(name, style=colour), pages, Text(self.describe(name), style="dim"))
        yield table
        yield Text("Underlined: shared.", style="dim")

    def _repr_html_(self) -> str:
        colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(self.pages)}
        box = "display:inline-block;min-width:1.8em;text-align:center;margin:1px;border:1px solid"
        cells = []
        for page, names in enumerate(self.owners):
            style = f"{box};border-style:{'double' if len(names) > 1 else 'solid'}"
            if names:
                style += f";{tint(colours[names[0]], 1)}"
            cells.append(element("span", str(page), style=style, title=", ".join(names) or "free"))
        lines = [
            element("div", *cells[start : start + PAGES_PER_LINE]) for start in range(0, len(cells), PAGES_PER_LINE)
        ]
        rows = [
            element(
                "tr",
                element("th", name, style=tint(colours[name], 1)),
                element("td", " ".join(map(str, held)), style="text-align:left"),
                element("td", self.describe(name), style="text-align:left"),
            )
            for name, held in self.pages.items()
        ]
        note = "A double border: held by several sequences. The pointer over a page shows who holds it."
        return element("div", element("b", self.summary), *lines, element("table", *rows), element("small", note))
