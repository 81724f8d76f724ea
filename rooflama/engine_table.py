"""What an engine holds at one moment: each sequence with its pages, and each page with its holders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from rooflama.models import TokenEngine
from rooflama.models.serving.prefix_cache import PrefixStatistics

COLUMNS = ("sequence", "status", "slot", "prompt", "drawn", "in cache", "pages", "shared", "preempted")
MARKS = " ·▪▩█"  # a page that is empty, keeps its contents, has one holder, two, more
COLOURS = ("#f0f0f0", "#cfe3f7", "#6aa5dd", "#2f6fb0", "#123a66")  # the same
MEANINGS = ("empty", "free, contents kept", "one holder", "two holders", "more holders")
LINE = 64  # pages per line


@dataclass(frozen=True)
class EngineTable:
    """A snapshot of an engine. Shows itself in a terminal and in Jupyter.

    Attributes:
        rows: one per sequence that waits or runs, in the order of ``COLUMNS``; a slot of "" is none.
        page_size: tokens per page.
        holders: of each page, the number of sequences that hold it.
        kept: pages without a holder whose contents a later sequence may begin with.
        wasted_tokens: places in held pages that hold no token.
        preemptions: how often a sequence gave up its pages.
        prefixes: statistics of the prefix cache; None if it is switched off.
    """

    rows: tuple[tuple[int | str, ...], ...]
    page_size: int
    holders: tuple[int, ...]
    kept: frozenset[int]
    wasted_tokens: int
    preemptions: int
    prefixes: PrefixStatistics | None

    @classmethod
    def of(cls, engine: TokenEngine) -> EngineTable:
        """The snapshot between two steps. Raises ModelClosed."""
        with engine.turns.turn():
            engine.check_open()
            scheduler, cache = engine.scheduler, engine.runner.cache
            references = cache.pool.references
            rows, wasted = [], 0
            for sequence in [*scheduler.running, *scheduler.waiting]:
                pages = () if sequence.cache_id is None else cache.pages(sequence.cache_id)
                if sequence.cache_id is not None:
                    wasted += cache.capacity(sequence.cache_id) - sequence.num_cached
                rows.append(
                    (
                        sequence.number,
                        sequence.status.value,
                        sequence.row if sequence.row >= 0 else "",
                        len(sequence.request.prompt),
                        len(sequence.token_ids),
                        sequence.num_cached,
                        len(pages),
                        sum(references[page] > 1 for page in pages),
                        sequence.preemptions,
                    )
                )
            kept = frozenset(page for page in cache.pool.kept if references[page] == 0)
            statistics = None if scheduler.prefixes is None else scheduler.prefixes.statistics
            return cls(
                tuple(rows),
                cache.page_size,
                tuple(references),
                kept,
                wasted,
                scheduler.preemptions,
                None if statistics is None else PrefixStatistics(**vars(statistics)),
            )

    def facts(self) -> list[str]:
        """The sums, as sentences without a full stop."""
        held, shared = sum(count > 0 for count in self.holders), sum(count > 1 for count in self.holders)
        facts = [
            f"{held} of {len(self.holders)} pages of {self.page_size} tokens held, {shared} of them shared, "
            f"{len(self.kept)} free with contents kept",
            f"{self.wasted_tokens} places in held pages without a token",
            f"{self.preemptions} preemptions",
        ]
        if (prefixes := self.prefixes) is not None:
            facts.append(
                f"{prefixes.hits} of {prefixes.lookups} sequences began with known pages: {prefixes.tokens_saved} of "
                f"{prefixes.tokens_asked} tokens not computed; {prefixes.pages_taken} known pages taken since"
            )
        return facts

    def _kinds(self) -> list[int]:
        """Of each page, the index of its mark."""
        return [min(count, 3) + 1 if count else int(page in self.kept) for page, count in enumerate(self.holders)]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        table = Table(*COLUMNS)
        for row in self.rows:
            table.add_row(*map(str, row))
        yield table
        marks = "".join(MARKS[kind] for kind in self._kinds())
        yield Text("\n".join(f"{start:>6} {marks[start : start + LINE]}" for start in range(0, len(marks), LINE)))
        yield Text("       " + ", ".join(f"'{mark}' {what}" for mark, what in zip(MARKS, MEANINGS, strict=True)))
        yield from map(Text, self.facts())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in self.rows)
        pages = "".join(
            f"<span title='page {page}: {MEANINGS[kind]}, {count} holders' style='display:inline-block;width:9px;"
            f"height:9px;margin:1px;background:{COLOURS[kind]}'></span>"
            for page, (kind, count) in enumerate(zip(self._kinds(), self.holders, strict=True))
        )
        facts = "<br>".join(escape(fact) for fact in self.facts())
        return (
            f"<table><tr>{head}</tr>{body}</table>"
            f"<div style='max-width:720px;line-height:0'>{pages}</div><small>{facts}</small>"
        )
