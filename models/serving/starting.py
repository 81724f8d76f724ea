"""A runner as a memory plan describes it."""

from __future__ import annotations

from rooflama.loaders.device import Device

from ..decoder import Decoder
from ..kv_cache import PagedKVCache
from ..memory.plan import MemoryPlan
from ..rope.spec import FactorSetPolicy
from .runner import ModelRunner


def start_runner(
    decoder: Decoder,
    plan: MemoryPlan,
    device: Device,
    *,
    longrope: FactorSetPolicy = "auto",
    num_tokens: int | None = None,
) -> ModelRunner:
    """A runner as ``plan`` describes it, with pages and tables, for weights that are on ``device`` already."""
    cache = PagedKVCache(
        plan.config,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_append=plan.prefill_chunk,
        dtype=plan.kv_dtype,
        device=device,
    )
    return ModelRunner(
        decoder,
        cache,
        max_context=plan.context,
        dtype=plan.dtype,
        prefill_chunk=plan.prefill_chunk,
        longrope=longrope,
        num_tokens=num_tokens,
    )
