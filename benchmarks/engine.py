"""The engine on a model with random weights: ``python benchmarks/engine.py [--out FILE.csv] [--small] [--only NAME]``.

mixed     requests of mixed lengths, all added at once: seconds until the last has ended, against what its passes take
          by themselves: prefill passes at the rate of one long prompt, and each decode step as ``step.py`` times it
host      median microseconds of host time in a step that only decodes: ``between`` two replays of the graph, without
          the wait for tokens, and in ``replay`` itself, while the GPU still works on the step before
prefix    sequences with a long common beginning: the share of the prefill work, and of the pages, that sharing saves,
          against the ideal of computing and holding the beginning once
second    milliseconds to the first token of a text whose beginning is known, by the length of that beginning

``--small`` runs a tiny model with short texts, also on a CPU, to see that everything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from memory_plan_check import RandomSource, ShapesOnly, config_of
from rooflama.loaders.device import open_device
from rooflama.loading import start_runner
from rooflama.models import (
    CheckpointReader,
    Decoder,
    ModelRunner,
    Request,
    SamplingParams,
    Sequence,
    TokenEngine,
    adapter_for,
)
from rooflama.models.serving import engine as engine_module
from rooflama.models.serving.runner import bucket
from rooflama.models.serving.sampler import Readback
from rooflama.planning import plan_for_device
from timing import provenance, write_rows


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths in tokens."""

    requests: int = 64
    prompts: tuple[int, int] = (100, 4000)
    answers: tuple[int, int] = (20, 500)
    shared: int = 8192
    sharers: int = 32
    histories: tuple[int, ...] = (512, 2048, 8192)
    long_prompt: int = 4096
    steps: int = 48

    @property
    def context(self) -> int:
        return max(sum((self.prompts[1], self.answers[1])), self.shared + 256, *(h + 256 for h in self.histories))


SMALL = Sizes(
    requests=5,
    prompts=(4, 30),
    answers=(2, 8),
    shared=200,
    sharers=3,
    histories=(70, 140),
    long_prompt=64,
    steps=4,
)


@contextmanager
def random_runner(sizes: Sizes, *, small: bool) -> Iterator[ModelRunner]:
    """The 8B shape in Q4_K_M's mix on the GPU; or the tiny one on whatever device there is."""
    config = dataclasses.replace(config_of("tiny" if small else "Llama-3-8B"), context_length=sizes.context)
    with open_device("cuda" if torch.cuda.is_available() else "cpu") as device:
        reader = CheckpointReader(ShapesOnly(config))
        options: dict[str, Any] = {"dtype": "auto", "kv_dtype": "auto"}
        plan = plan_for_device(reader, config, device, context=sizes.context, **options)
        pages = sizes.requests * (sum(sizes.prompts) + sum(sizes.answers)) // 2 + 4 * sizes.context
        plan = plan.but(sequences=max(2, -(-pages // sizes.context)))
        decoder = Decoder.load(RandomSource(reader, device), config, adapter_for("llama"))
        with torch.no_grad():
            runner = start_runner(decoder, plan, device)
            for pool in (*runner.cache.k_pages, *runner.cache.v_pages):
                pool.zero_()  # steps are also timed on pages that nothing was written to
            yield runner


def request(
    rng: np.random.Generator, runner: ModelRunner, prompt: int, answer: int, *, after: Items[int] = ()
) -> Sequence:
    """A sequence of ``after``, then ``prompt`` random tokens, that draws ``answer`` tokens."""
    tokens = rng.integers(0, runner.decoder.config.vocab_size, prompt).tolist()
    return Sequence(Request([*after, *tokens], answer, SamplingParams()))


def run_all(engine: TokenEngine, sequences: list[Sequence]) -> float:
    """Seconds until all have ended."""
    started = time.perf_counter()
    for sequence in sequences:
        engine.add(sequence)
    for sequence in sequences:
        engine.advance(sequence, until=lambda: False)  # raises what ended a sequence before its time
    return time.perf_counter() - started


class Watch:
    """Sees what an engine computes: tokens of prefill passes, and (rows, tokens in their caches) of decode steps."""

    def __init__(self, engine: TokenEngine):
        self.prefilled: list[int] = []
        self.steps: list[tuple[int, int]] = []
        schedule = engine.scheduler.schedule

        def watched() -> Any:
            batch = schedule()
            self.prefilled.append(sum(count for _, count in batch.prefill))
            self.steps.append((len(batch.decode), sum(sequence.num_cached for sequence in batch.decode)))
            return batch

        engine.scheduler.schedule = watched


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def decode_seconds(runner: ModelRunner, rows: int, context: int, steps: int) -> float:
    """Seconds of a decode step of ``rows`` sequences with about ``context`` tokens, as ``step.py`` times it."""
    slots = engine_module.DecodeSlots(runner, rows, swaps={})
    ids = [runner.cache.add() for _ in range(rows)]
    for cache_id in ids:
        runner.cache.reserve(cache_id, context + steps + 8)
        sequence = Sequence(Request([0], None, SamplingParams()), cache_id=cache_id, num_cached=context)
        slots.join(sequence, limit=context + steps + 8)
    for _ in range(4):
        slots.step()
    synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        slots.step()
    synchronize()
    seconds = (time.perf_counter() - started) / steps
    for cache_id in ids:
        runner.cache.free(cache_id)
    return seconds


def mixed(runner: ModelRunner, sizes: Sizes) -> dict[str, float]:
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(*sizes.prompts)), int(rng.integers(*sizes.answers))) for _ in range(sizes.requests)]
    engine = TokenEngine(runner, num_slots=sizes.requests, prefix_cache=False)
    run_all(engine, [request(rng, runner, *pair) for pair in lengths])  # compiles, and captures every bucket
    run_all(engine, [request(rng, runner, *pair) for pair in lengths])
    watch = Watch(engine)
    seconds = run_all(engine, [request(rng, runner, *pair) for pair in lengths])

    contexts: dict[int, list[float]] = defaultdict(list)
    for rows, cached in watch.steps:
        if rows:
            contexts[bucket(rows, sizes.requests)].append(cached / rows)
    decode = sum(
        len(seen) * decode_seconds(runner, rows, int(statistics.mean(seen)), sizes.steps)
        for rows, seen in contexts.items()
    )
    alone = [run_all(engine, [request(rng, runner, sizes.long_prompt, 1)]) for _ in range(4)]
    prefill = sum(watch.prefilled) * min(alone) / sizes.long_prompt
    tokens = sum(answer for _, answer in lengths)
    return {
        "seconds": seconds,
        "predicted_prefill": prefill,
        "predicted_decode": decode,
        "ratio": seconds / (prefill + decode),
        "tokens_per_s": tokens / seconds,
        "preemptions": engine.scheduler.preemptions,
    }


def host(runner: ModelRunner, sizes: Sizes) -> dict[str, float]:
    rng = np.random.default_rng(1)
    engine = TokenEngine(runner, num_slots=sizes.requests, prefix_cache=False)
    for number in range(sizes.requests):  # whose pages are full at different steps
        engine.add(request(rng, runner, 4 + number % runner.cache.page_size, 4 * sizes.steps))
    waited: list[float] = []
    replayed: list[float] = []

    def timed(method: Callable[[Any], Any], times: list[float]) -> Callable[[Any], Any]:
        def call(owner: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(owner)
            finally:
                times.append(time.perf_counter() - started)

        return call

    graph = torch.cuda.CUDAGraph
    between, replays = [], []
    with (
        mock.patch.object(Readback, "wait", timed(Readback.wait, waited)),
        mock.patch.object(graph, "replay", timed(graph.replay, replayed)),
    ):
        for _ in range(3 * sizes.steps):
            waited.clear()
            replayed.clear()
            started = time.perf_counter()
            handed = engine.step()
            if len(handed) == sizes.requests:
                between.append(time.perf_counter() - started - sum(waited) - sum(replayed))
                replays.append(sum(replayed))
    for sequence in [*engine.scheduler.running]:
        engine.cancel(sequence)
    late = len(between) // 3
    return {
        "sequences": sizes.requests,
        "between_us": statistics.median(between[late:]) * 1e6,
        "replay_us": statistics.median(replays[late:]) * 1e6,
    }


def prefix(runner: ModelRunner, sizes: Sizes) -> dict[str, float]:
    rng, own, answer = np.random.default_rng(2), 16, 8
    engine = TokenEngine(runner)
    shared = rng.integers(0, runner.decoder.config.vocab_size, sizes.shared).tolist()
    sequences = [request(rng, runner, own, answer, after=shared) for _ in range(sizes.sharers)]
    watch, pool, most = Watch(engine), runner.cache.pool, 0
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
        most = max(most, len(pool.references) - pool.num_free)
    size = runner.cache.page_size
    unshared_pages = sizes.sharers * -(-(sizes.shared + own + answer) // size)
    ideal_pages = sizes.shared // size + sizes.sharers * -(-(sizes.shared % size + own + answer) // size)
    unshared, ideal = sizes.sharers * (sizes.shared + own), sizes.shared + sizes.sharers * own
    return {
        "work_saved": (unshared - sum(watch.prefilled)) / (unshared - ideal),
        "pages_saved": (unshared_pages - most) / (unshared_pages - ideal_pages),
    }


def second(runner: ModelRunner, sizes: Sizes) -> dict[str, float]:
    rng, engine, result = np.random.default_rng(3), TokenEngine(runner), {}
    for history in sizes.histories:
        times = []
        for _ in range(5):
            first = request(rng, runner, history, 8)
            run_all(engine, [first])
            text = first.request.prompt + first.token_ids
            times.append(run_all(engine, [request(rng, runner, 32, 1, after=text)]))
        result[f"after_{history}_ms"] = statistics.median(times) * 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures there, as CSV")
    parser.add_argument("--small", action="store_true", help="a tiny model and short texts")
    benchmarks = {one.__name__: one for one in (mixed, host, prefix, second)}
    parser.add_argument("--only", choices=benchmarks, nargs="+", default=[*benchmarks], help="run some of them")
    options = parser.parse_args()
    sizes, rows = SMALL if options.small else Sizes(), []
    with random_runner(sizes, small=options.small) as runner:
        for benchmark in (benchmarks[name] for name in options.only):
            for figure, value in benchmark(runner, sizes).items():
                print(f"{benchmark.__name__:8} {figure:20} {value:,.3f}", flush=True)
                rows.append({"benchmark": benchmark.__name__, "figure": figure, "value": f"{value:.4f}"})
    if options.out:
        write_rows(options.out, [row | provenance() for row in rows])


if __name__ == "__main__":
    main()
