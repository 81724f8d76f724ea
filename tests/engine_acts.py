"""What the engine's tests do to it: sequences that come, go, and lose their pages; threads that share it."""

import contextvars
import threading

from hypothesis import strategies as st


def acts_of(*requests):
    """An act: a request to add, a number of steps, or a word. ``requests`` are strategies of tuples."""
    return st.one_of(*requests, st.integers(1, 12), *map(st.just, ("cancel", "preempt", "forget")))


def finish(engine, *sequences):
    for sequence in sequences:
        engine.advance(sequence, until=lambda: False)


def play(engine, acts, sequence_of):
    """Do the acts and finish what was added: the (request, sequence) pairs, and the sequences that were cancelled."""
    added, cancelled = [], set()
    for act in acts:
        live = [sequence for _, sequence in added if not sequence.has_ended]
        if isinstance(act, tuple):
            added.append((act, sequence_of(*act)))
            engine.add(added[-1][1])
        elif act == "cancel" and live:
            engine.cancel(live[len(live) // 2])
            cancelled.add(live[len(live) // 2])
        elif act == "preempt" and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[0])
        elif act == "forget":
            engine.scheduler.prefixes.forget()
        elif isinstance(act, int):
            for _ in range(act):
                engine.step()
    finish(engine, *(sequence for _, sequence in added))
    return added, cancelled


def run_in_threads(actions, wait_s):
    """Each action in a thread with this one's context, all at the same time. Each must end within ``wait_s``."""
    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(action,), daemon=True) for action in actions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(wait_s)
        assert not thread.is_alive()
