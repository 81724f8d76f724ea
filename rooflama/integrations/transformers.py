"""``attn_implementation="rooflama"`` in Hugging Face transformers: causal models run on our attention kernels.

    from rooflama.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="rooflama")

transformers calls two functions by that name. ``make_mask`` is called once per forward pass and kind of layer. It
returns where each sequence's keys begin and how many there are, instead of a mask per query and key. ``attend`` is
called by every layer, with K/V as the model's cache holds them.

Served: causal attention, sliding windows, soft caps, any group of query heads, dynamic and static caches. Padding may
be on the left, on the right, and, for one query per sequence, anywhere. Everything else is refused, gradients too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rooflama.models import ArgumentError

from . import flash
from .dense import dense_attention

NAME = "rooflama"
FLASH_NAME = "rooflama/flash-attn2"  # an owner and a name, as hub kernels have; "flash" and 2 make it flash attention 2


def register() -> None:
    """Make ``attn_implementation="rooflama"`` known to transformers. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def register_flash() -> None:
    """Make ``attn_implementation="rooflama/flash-attn2"`` known: transformers' flash attention on our functions.

    Continuous batching, with transformers 5.20 or later, takes flash attention by name alone, and finds its functions
    through the loader of hub kernels. That loader is given ``rooflama.integrations.flash`` here. transformers keeps one
    flash implementation at a time: call this again after a model has loaded another one.
    """
    from transformers.integrations import hub_kernels
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    known = {"get_kernel": lambda *_, **__: flash, "is_kernels_available": lambda: True, "_kernels_available": True}
    kept = {name: getattr(hub_kernels, name) for name in known if hasattr(hub_kernels, name)}
    try:
        for name in kept:
            setattr(hub_kernels, name, known[name])
        lazy_import_flash_attention(FLASH_NAME)
    finally:
        for name, value in kept.items():
            setattr(hub_kernels, name, value)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers' AttentionInterface calls it.

    Args:
        query: [batch, num_heads, num_queries, head_dim].
        key, value: [batch, num_kv_heads, num_keys, head_dim], the cache's keys included.
        attention_mask: from ``make_mask``; None if every sequence sees all keys up to its queries'.

    Returns:
        ([batch, num_queries, num_heads, head_dim], None). What padding tokens get is not defined.

    Raises:
        ArgumentError: the layer asks for something that is not served.
        KernelInputError: a tensor requires grad, or shapes and dtypes do not fit.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    num_queries = query.shape[2]
    _refuse(dropout > 0, f"dropout={dropout}", "Call model.eval()")
    _refuse(not is_causal and num_queries > 1, "attention that is not causal")
    _refuse(bool(others.get("output_attentions")), "output_attentions=True", 'Use attn_implementation="eager"')
    for name in ("s_aux", "position_bias", "cache", "cu_seq_lens_q"):
        _refuse(others.get(name) is not None, f"{name} given to attention")
    if attention_mask is not None:
        ours = attention_mask.dtype == torch.int32 or (attention_mask.dtype == torch.bool and num_queries == 1)
        _refuse(not ours, f"an attention mask {attention_mask.dtype} {list(attention_mask.shape)} of your own")
    out = dense_attention(
        query,
        key,
        value,
        attention_mask,
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window or 0,
        softcap=softcap or 0.0,
    )
    return out, None


def make_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor:
    """The keys that each sequence has, as transformers' AttentionMaskInterface asks for them.

    Args:
        kv_length: keys that attention will be given; the first is the sequence's key ``kv_offset``.
        mask_function: (batch, head, query, key) -> whether the query sees the key, for indices that broadcast.
        attention_mask: bool [batch, number of tokens], False for padding.
        local_size: the sliding window in tokens, if there is one.
        q_length, q_offset: number of queries, and the position of the first. transformers 4 passes ``cache_position``,
            int64 [num_queries], instead.

    Returns:
        ``seen`` of ``dense_attention``. Four dimensions, because transformers hands such a mask on as it is.

    Raises:
        ArgumentError: the mask is not causal with at most a sliding window, or its padding has holes that several
            queries of one pass see.
    """
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    assert q_length is not None
    positions = torch.arange(q_length, device=device) + q_offset
    _check_pattern(mask_function, local_size, batch_size, positions, kv_offset, kv_length, use_vmap)
    end = q_offset + q_length - kv_offset  # the keys behind are not written yet
    first = torch.zeros(batch_size, dtype=torch.int32, device=device)
    if attention_mask is not None:
        keys = torch.arange(kv_length, device=device)
        visible = torch.nn.functional.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))
        visible = visible[:, kv_offset : kv_offset + kv_length].bool() & (keys < end)
        first = visible.int().argmax(1).int()
        # Padding behind the last key is a query itself, if there are several. Nobody else's query sees it.
        last = (visible * (keys + 1)).amax(1) if q_length > 1 else torch.zeros_like(first) + end
        if bool((visible != ((keys >= first[:, None]) & (keys < last[:, None]))).any()):
            _refuse(
                q_length > 1,
                f"padding between the keys of {q_length} queries",
                'Pad on the left, pass one token at a time, or use attn_implementation="sdpa"',
            )
            if local_size is not None:
                visible = visible & (keys + kv_offset > positions - local_size)
            return visible[:, None, None]
    return torch.stack([first, (end - first).int()]).t()[:, None, None]


def _check_pattern(
    mask_function: Callable[..., Tensor],
    window: int | None,
    batch_size: int,
    positions: Tensor,
    kv_offset: int,
    kv_length: int,
    use_vmap: bool,
) -> None:
    """The mask function must be causal, with this window: compared on both sides of each query's first and last key."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return
    _refuse(use_vmap, "a mask function of your own")
    reach = kv_offset + kv_length if window is None else window
    queries = positions[:, None]
    keys = torch.cat([queries - reach, queries - reach + 1, queries, queries + 1], dim=1)
    keys = keys.clamp(kv_offset, kv_offset + kv_length - 1)
    rows = torch.arange(batch_size, device=positions.device)[:, None, None, None]
    found = mask_function(rows, torch.zeros_like(rows[:1]), queries, keys)
    same = found == ((keys <= queries) & (keys > queries - reach))
    _refuse(not bool(same.all()), "a mask that is not causal with one sliding window, as of packed sequences or chunks")


def _refuse(condition: bool, found: str, remedy: str = 'Use attn_implementation="sdpa"') -> None:
    if condition:
        raise ArgumentError(
            found,
            rule='attn_implementation="rooflama" serves causal attention with padding and sliding windows',
            remedy=remedy,
        )
