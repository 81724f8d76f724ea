"""What int8 and fp8 K/V pages cost in quality: ``python benchmarks/kv_quality.py [--out FILE.csv] [--tokens N]``.

The demo checkpoint reads ``texts/alice.txt`` as one sequence, once per kind of pages. Weights and activations are the
same each time. The logits after each token are compared with those over pages of the activations' own dtype:

perplexity  exp of the mean of -ln p(next token)
kl          KL divergence in nats, sum of p ln(p / q), p over the own pages, q over the others: mean and largest
top1        share of the tokens for which the likeliest next token is the same

The last case is a yardstick: activations and pages both in bfloat16.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import rooflama
from timing import provenance, write_rows

TEXT = Path(__file__).parent / "texts" / "alice.txt"
OWN = ("float32", "float32")
CASES = [OWN, ("float32", "int8"), ("float32", "fp8"), ("bfloat16", "bfloat16")]  # (activations, pages)
ROWS = 256  # tokens whose probabilities exist at once, in float64


def logits_of(text: str, num_tokens: int | None, activations: str, pages: str) -> tuple[list[int], Tensor]:
    """The text's first tokens, and the logits after each, float32 [num_tokens, vocab_size]."""
    path = rooflama.demo_checkpoint()
    tokens = rooflama.load_tokenizer(path).encode(text)[:num_tokens]
    options = {"dtype": activations, "kv_dtype": pages, "max_context": len(tokens) + 1}
    with rooflama.load(path, progress=False, **options) as model:
        return tokens, model.logits(tokens)


def figures(tokens: list[int], own: Tensor, logits: Tensor) -> dict[str, float]:
    """The module's figures for ``logits``, compared with ``own``; both [num_tokens, vocab_size]."""
    surprise, divergence, same = [], [], []
    following = torch.tensor(tokens[1:])[:, None]
    for target, exact, other in zip(following.split(ROWS), own[:-1].split(ROWS), logits[:-1].split(ROWS), strict=True):
        p, q = (part.double().log_softmax(-1) for part in (exact, other))
        surprise.append(-q.gather(1, target)[:, 0])
        divergence.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    kl = torch.cat(divergence)
    return {
        "perplexity": math.exp(torch.cat(surprise).mean()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float(torch.cat(same).double().mean()),
    }


def measure(text: str, num_tokens: int | None) -> list[dict[str, object]]:
    """A row for each case, the own pages first."""
    rows: list[dict[str, object]] = []
    tokens, own = logits_of(text, num_tokens, *OWN)
    for activations, pages in CASES:
        logits = own if (activations, pages) == OWN else logits_of(text, num_tokens, activations, pages)[1]
        result = {name: f"{value:.6g}" for name, value in figures(tokens, own, logits).items()}
        rows.append({"activations": activations, "pages": pages, "tokens": len(tokens), **result})
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures there, as CSV")
    parser.add_argument("--tokens", type=int, help="of the text, from its beginning; all by default")
    options = parser.parse_args()
    rows = measure(TEXT.read_text(), options.tokens)
    if options.out:
        write_rows(options.out, [row | provenance() for row in rows])


if __name__ == "__main__":
    main()
