"""What the first token waits for: ``python -P first_token_phases.py $(date +%s.%N) MODEL [OPTION ...]``.

Prints seconds since the given time. ``TRITON_CACHE_DIR`` is cold or warm. Options:
    --serial        each kernel is compiled when it is first used
    --threads=N     compile
    --late          nothing is made while torch is imported (rooflama/cli/ahead.py)
    --nogc          without Python's garbage collector
"""

import gc
import sys
import threading
import time

START, MODEL, OPTIONS = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
events = []


def mark(name):
    events.append((time.time() - START, name))


def timed(owner, name):
    function = getattr(owner, name)

    def call(*args, **kwargs):
        started = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            mark(f"{name} {time.time() - started:.3f} s in {threading.current_thread().name}")

    setattr(owner, name, call)


mark("Python")
if "--nogc" in OPTIONS:
    gc.disable()
# Imports stand between marks, because their times are what is measured: hence noqa E402.
from rooflama.cli import ahead  # noqa: E402

timed(ahead, "_make")
if "--late" not in OPTIONS:
    ahead.begin("auto")
import torch  # noqa: E402, F401

mark("torch imported")
import triton  # noqa: E402

mark("triton imported")
import rooflama  # noqa: E402
from rooflama import cli, loading, warming  # noqa: E402
from rooflama.kernels import rehearsal  # noqa: E402
from rooflama.models.serving import engine  # noqa: E402

mark("rooflama imported")
cli.run.begin = lambda device: None
for name in ("find_device", "open_checkpoint", "open_tokenizer", "open_device", "_plan", "start_runner", "load"):
    timed(loading, name)
rooflama.load = loading.load
timed(triton.runtime.cache, "triton_key")
for name in ("rehearse", "compile_launches"):
    timed(warming, name)
timed(loading.Decoder, "load")
timed(loading.Compiling, "wait")
timed(engine.TokenEngine, "_prefill")
timed(engine.Readback, "wait")
compiled = []


def listen(*, times, cache_hit, **_):
    compiled.append((cache_hit, times.total / 1e6))


triton.knobs.compilation.listener = listen
for option in OPTIONS:
    if option == "--serial":
        loading.replays = lambda device: False
    if option.startswith("--threads="):
        rehearsal.MOST_THREADS = int(option.partition("=")[2])


class Answer:
    """Standard output, of which only the first token's time matters."""

    def write(self, text):
        if text.strip() and not any(name == "FIRST TOKEN" for _, name in events):
            mark("FIRST TOKEN")
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


sys.stdout, sys.argv = Answer(), ["rooflama", "run", MODEL, "The sky is", "--max-new-tokens", "1"]
try:
    cli.main()
finally:
    for seconds, name in sorted(events):
        print(f"{seconds:7.3f} {name}", file=sys.stderr)
    hits = sum(hit for hit, _ in compiled)
    print(f"{len(compiled)} kernels, {hits} from the cache, {sum(s for _, s in compiled):.1f} s", file=sys.stderr)
