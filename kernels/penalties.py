"""Penalties on the logits of tokens that a text holds already, as vLLM and OpenAI's API define them.

    z = logit / repetition if positive, else logit * repetition      for tokens of the prompt or the text
    z = z - frequency * (times the token was drawn) - presence * (was it drawn?)

Layout: logits float32 [num_seqs, vocab], written in place; seen int32 [num_seqs, vocab], 2 * (times drawn), and 1 more
if the prompt holds the token; each penalty a tensor [num_seqs] on the device, so that a captured graph can be replayed.
One program owns BLOCK tokens of one row.
Numerics: float32, every operation rounded once.
Moves: 12 bytes per token for about 5 flops: bandwidth-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import check, check_dtype, check_last_dim_contiguous, check_same_device, check_sequences, check_shape
from .kernel import Launch, kernel, launch, nothing

BLOCK = 1024


@triton.jit
def _penalise_kernel(
    logits_ptr,  # [num_seqs, vocab]
    seen_ptr,  # [num_seqs, vocab]
    repetition_ptr,  # [num_seqs]
    frequency_ptr,  # [num_seqs]
    presence_ptr,  # [num_seqs]
    logits_stride,
    seen_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < vocab
    logits = tl.load(logits_ptr + row * logits_stride + offs, mask=mask, other=0.0)
    seen = tl.load(seen_ptr + row * seen_stride + offs, mask=mask, other=0)
    repetition = tl.broadcast_to(tl.load(repetition_ptr + row), logits.shape)
    repeated = tl.where(logits < 0.0, logits * repetition, tl.div_rn(logits, repetition))
    z = tl.where(seen != 0, repeated, logits)
    drawn = (seen >> 1).to(tl.float32)
    z -= tl.load(frequency_ptr + row) * drawn
    z -= tl.where(drawn > 0.0, tl.load(presence_ptr + row), 0.0)
    tl.store(logits_ptr + row * logits_stride + offs, z, mask=mask)


def _check(logits: Tensor, seen: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> None:
    check_shape("logits", logits, (None, None))
    num_seqs, vocab = logits.shape
    check_sequences(num_seqs)
    check_shape("seen", seen, (num_seqs, vocab))
    check_dtype("logits", logits, (torch.float32,))
    check_dtype("seen", seen, (torch.int32,))
    columns = {"repetition": repetition, "frequency": frequency, "presence": presence}
    for name, column in columns.items():
        check_shape(name, column, (num_seqs,))
        check_dtype(name, column, (torch.float32,))
    check_last_dim_contiguous(logits=logits, seen=seen, **columns)
    check_same_device(logits=logits, seen=seen, **columns)
    if logits.device.type == "cpu" and not (good := repetition > 0).all():
        found, rule = f"repetition {repetition[~good][0].item()}", "repetition must be positive; 1 is off"
        check(False, found, rule, "Change repetition")


@kernel(checks=_check, output=nothing, definition=reference.penalise, mutates=("logits",))
def penalise(
    out: None, logits: Tensor, seen: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Launch:
    """Lower in place the logits of tokens that were seen. Negative penalties raise them.

    Args:
        logits: float32 [num_seqs, vocab]. Written.
        seen: int32 [num_seqs, vocab]: 2 for each time that a token was drawn, and 1 more if the prompt holds it.
        repetition: float32 [num_seqs], positive; 1 is off.
        frequency, presence: float32 [num_seqs]; 0 is off.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (seen on the CPU only) a repetition penalty is not
            positive.
    """
    num_seqs, vocab = logits.shape
    return launch(
        _penalise_kernel,
        (triton.cdiv(vocab, BLOCK), num_seqs),
        logits,
        seen,
        repetition,
        frequency,
        presence,
        logits.stride(0),
        seen.stride(0),
        vocab,
        BLOCK=BLOCK,
    )
