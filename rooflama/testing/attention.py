"""What the attention tests draw and build: K/V in poisoned pages, made from a few numbers and a seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from .assertions import assert_within_rounding
from .strategies import DEVICE, dtypes, exact, guarded, normal, seeds

NAN = float("nan")
GROUPS = [*range(1, 17), 24, 32]
HEAD_DIMS = [8, 10, 16, 40, 64, 80, 96, 100, 112, 128, 160, 192, 256]
PAGE_SIZES = [16, 32, 64, 128, 256]
TOP = {torch.int8: 40.0, torch.float8_e4m3fn: 100.0}  # codes drawn for a value of 1, before the scale's own factor


@dataclass(frozen=True)
class Drawn:
    """The numbers from which one problem's arrays are made."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None  # None: dtype
    sliding_window: int = 0
    softcap: float = 0.0
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        scale = 1.5 / self.head_dim**0.5
        return {"softmax_scale": scale, "sliding_window": self.sliding_window, "softcap": self.softcap}


@dataclass(frozen=True)
class Pages:
    """K/V in pages with poison in every slot that no sequence owns, one poisoned page before and one after."""

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def scales(self) -> dict[str, Tensor | None]:
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}


@dataclass(frozen=True)
class Dense:
    """One sequence: its queries [Q, num_heads, head_dim], K/V [S, num_kv_heads, head_dim] as stored, and scales."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def floats(self) -> tuple[Tensor, Tensor]:
        """K and V as numbers: codes times scales."""
        if self.k_scale is None or self.v_scale is None:
            return self.k, self.v
        return self.k.float() * self.k_scale[..., None], self.v.float() * self.v_scale[..., None]


page_sizes = st.sampled_from(PAGE_SIZES)
page_dtypes = st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn])
shapes = {
    "num_kv_heads": st.sampled_from([1, 2]),
    "group": st.sampled_from(GROUPS),
    "head_dim": st.sampled_from(HEAD_DIMS),
    "page_size": page_sizes,
    "dtype": dtypes,
    "page_dtype": page_dtypes,
    "sliding_window": st.just(0) | st.integers(1, 90),
    "softcap": st.sampled_from([0.0, 0.0, 2.0, 30.0]),
    "seed": seeds,
}


def _numbers(fixed: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The numbers of ``shapes``, but for those that are ``fixed``: to a value, or to what a strategy draws."""
    if unknown := sorted(set(fixed) - set(shapes)):
        raise TypeError(f"{unknown} of an attention problem: what can be fixed is {', '.join(shapes)}")
    chosen = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    return st.fixed_dictionaries(shapes | chosen)


@st.composite
def prefills(draw, **fixed: Any) -> Drawn:
    """Sequences of 0 to 50 queries, fewer for large groups, after 0 to 110 keys of context; three at most."""
    drawn = draw(_numbers(fixed))
    queries = st.integers(0, min(50, 1 + 150 // drawn["group"]))
    lens = draw(st.lists(st.tuples(st.integers(0, 110), queries), min_size=1, max_size=3))
    return Drawn(
        query_lens=tuple(length for _, length in lens), seq_lens=tuple(context + q for context, q in lens), **drawn
    )


@st.composite
def decodes(draw, **fixed: Any) -> Drawn:
    """Sequences of 0 to 400 keys, at most three at once: none, one or several splits."""
    lens = draw(st.lists(st.integers(0, 70) | st.integers(0, 400), min_size=1, max_size=3))
    return Drawn(query_lens=(1,) * len(lens), seq_lens=tuple(lens), **draw(_numbers(fixed)))


def sequences(drawn: Drawn) -> list[Dense]:
    rng = np.random.default_rng(drawn.seed)
    found = []
    for queries, keys in zip(drawn.query_lens, drawn.seq_lens, strict=True):
        q = normal(rng, queries, drawn.num_kv_heads * drawn.group, drawn.head_dim, dtype=drawn.dtype)
        shape = (keys, drawn.num_kv_heads, drawn.head_dim)
        page_dtype = drawn.page_dtype or drawn.dtype
        if page_dtype not in TOP:
            found.append(Dense(q, *(normal(rng, *shape, dtype=page_dtype) for _ in range(2))))
            continue
        top = TOP[page_dtype]
        k, v = (normal(rng, *shape, scale=top).clamp(-127, 127).to(page_dtype) for _ in range(2))
        k_scale, v_scale = (
            torch.from_numpy(rng.uniform(0.5, 2.0, shape[:2]) / top).to(dtype=torch.float32, device=DEVICE)
            for _ in range(2)
        )
        found.append(Dense(q, k, v, k_scale, v_scale))
    return found


def paged(dense: list[Dense], page_size: int, *, seed: int = 0, base: int = 0) -> Pages:
    """Lay sequences out in pages, in random places. Keys before ``base`` are left out, their pages freed."""
    rng = np.random.default_rng(seed)
    counts = [-(-len(s.k) // page_size) for s in dense]
    num_pages = sum(counts) + 2
    order = rng.permutation(num_pages)
    # entries that no key needs name the poisoned pages outside the pool
    table = rng.choice([-1, num_pages], (len(dense), max(counts, default=0) + 2))
    places = []
    for row, (s, count) in enumerate(zip(dense, counts, strict=True)):
        own, order = order[:count], order[count:]
        kept = slice(min(base, len(s.k)) // page_size, count)
        table[row, kept] = own[kept]
        keys = np.arange(min(base, len(s.k)), len(s.k))
        places.append((own[keys // page_size], keys % page_size, keys))

    def pool(name: str) -> Any:
        parts = [getattr(s, name) for s in dense]
        if parts[0] is None:
            return None
        shape = (num_pages + 2, page_size, *parts[0].shape[1:])
        # int8 has no NaN: the scale beside the code is poisoned
        buffer = torch.full(shape, NAN if parts[0].is_floating_point() else 127, dtype=torch.float32, device=DEVICE)
        for part, (pages, slots, keys) in zip(parts, places, strict=True):
            if len(keys):
                buffer[torch.from_numpy(pages + 1), torch.from_numpy(slots)] = part[keys[0] :].float()
        return buffer.to(parts[0].dtype)[1:-1]

    return Pages(
        pool("k"),
        pool("v"),
        int32(table),
        pool("k_scale"),
        pool("v_scale"),
    )


def int32(values: Any) -> Tensor:
    """On DEVICE, with poison before and after."""
    array = values if isinstance(values, np.ndarray) else np.array(list(values))
    return guarded(torch.from_numpy(array.astype(np.int32)).to(DEVICE))[0]


def starts(lens: Any) -> Tensor:
    return int32([0, *np.cumsum(list(lens), dtype=int)])


def stacked(dense: list[Dense]) -> Tensor:
    """The queries of all sequences, with poison before and after."""
    q = torch.cat([s.q for s in dense])
    buffer = torch.full((len(q) + 2, *q.shape[1:]), NAN, dtype=q.dtype, device=DEVICE)
    buffer[1:-1] = q
    return buffer[1:-1]


def run_prefill(kernel: Any, drawn: Drawn, dense: list[Dense], **pages: Any) -> tuple[Tensor, Tensor]:
    laid = paged(dense, drawn.page_size, **pages)
    lens = (int32(len(s.k) for s in dense), starts(len(s.q) for s in dense))
    return kernel(stacked(dense), laid.k_pages, laid.v_pages, laid.block_table, *lens, **laid.scales, **drawn.options)


def run_decode(kernel: Any, drawn: Drawn, dense: list[Dense], **pages: Any) -> tuple[Tensor, Tensor]:
    laid = paged(dense, drawn.page_size, **pages)
    lens = int32(len(s.k) for s in dense)
    return kernel(stacked(dense), laid.k_pages, laid.v_pages, laid.block_table, lens, **laid.scales, **drawn.options)


def arguments(drawn: Drawn, *, decode: bool = False) -> dict[str, Any]:
    """The arguments of the kernel, by name."""
    dense = sequences(drawn)
    laid = paged(dense, drawn.page_size)
    fields = {"q": stacked(dense), "k_pages": laid.k_pages, "v_pages": laid.v_pages, "block_table": laid.block_table}
    lens = {"seq_lens": int32(drawn.seq_lens)} | ({} if decode else {"query_start_loc": starts(drawn.query_lens)})
    return {**fields, **lens, **laid.scales, **drawn.options}


def define(definition: Any, drawn: Drawn, dense: list[Dense], *, decode: bool) -> tuple[np.ndarray, np.ndarray]:
    """The NumPy definition in float64."""
    laid = paged(dense, drawn.page_size)
    scales = {name: None if scale is None else exact(scale) for name, scale in laid.scales.items()}
    lens = [int32(len(s.k) for s in dense)] + ([] if decode else [starts(len(s.q) for s in dense)])
    integers = (t.cpu().numpy() for t in (laid.block_table, *lens))
    return definition(
        exact(stacked(dense)), exact(laid.k_pages), exact(laid.v_pages), *integers, **scales, **drawn.options
    )


def visible(drawn: Drawn, queries: int, keys: int) -> Tensor:
    """[queries, keys], built one comparison at a time."""
    positions = (keys - queries + torch.arange(queries))[:, None]
    mask = torch.arange(keys) <= positions
    if drawn.sliding_window:
        mask &= torch.arange(keys) > positions - drawn.sliding_window
    return mask.to(DEVICE)


def torch_attention(drawn: Drawn, s: Dense) -> Tensor:
    """The textbook formula in float32, weights and result rounded to q's dtype: the error of rounding alone."""
    k, v = (x.float().repeat_interleave(drawn.group, 1).transpose(0, 1) for x in s.floats())
    scores = s.q.float().transpose(0, 1) @ k.transpose(1, 2) * drawn.options["softmax_scale"]
    if drawn.softcap:
        scores = drawn.softcap * torch.tanh(scores / drawn.softcap)
    scores = scores.masked_fill(~visible(drawn, len(s.q), len(s.k)), -torch.inf)
    top = scores.amax(-1, keepdim=True) if len(s.k) else scores.new_zeros(*scores.shape[:2], 1)
    weights = torch.exp(scores - top.clamp(min=-1e30))
    total = weights.sum(-1, keepdim=True)
    out = weights.to(s.q.dtype).float() @ v / torch.where(total == 0, 1, total)
    return out.transpose(0, 1).to(s.q.dtype)


def score_span(q: Iterable[Tensor], k: Iterable[Tensor], softmax_scale: float) -> float:
    """softmax_scale |q| |k| of the longest query and key, each [..., head_dim]: the largest score. NaN counts as 0."""
    longest = [
        max((float(x.float().nan_to_num(0.0).norm(dim=-1).max()) for x in parts if x.numel()), default=0.0)
        for parts in (q, k)
    ]
    return softmax_scale * longest[0] * longest[1]


def units(span: float, v: Iterable[Tensor], reference: np.ndarray, dtype: torch.dtype) -> float:
    """The ``c`` of :func:`assert_within_rounding` for attention's output in ``dtype``.

    A score is a sum of head_dim products, so it is off by float32's eps times ``span`` (:func:`score_span`); weights
    are off by as much, relatively, and by their rounding; out, a mean of values, by that times the largest value. NaN
    in ``v`` counts as 0.
    """
    largest = max((float(x.float().nan_to_num(0.0).abs().max()) for x in v if x.numel()), default=0.0)
    eps = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    scale = np.abs(reference).max(initial=0.0) or 1.0
    return (4.0 + span * eps) * max(1.0, largest / scale)


def assert_attention(
    got: tuple[Tensor, Tensor | None], want: tuple[np.ndarray, np.ndarray], drawn: Drawn, dense: list[Dense]
) -> None:
    """out and lse against the definition. lse may be None: not computed."""
    out, lse = got
    k, v = ([x for s in dense if (x := s.floats()[i]).numel()] for i in range(2))
    span = score_span([s.q for s in dense], k, drawn.options["softmax_scale"])
    context = str(drawn)
    same = torch.cat([torch_attention(drawn, s) for s in dense])
    assert_within_rounding(out, want[0], same, c=units(span, v, want[0], out.dtype), context=f"out; {context}")
    if lse is None:
        return
    finite = np.abs(want[1][np.isfinite(want[1])]).max(initial=0.0) or 1.0
    assert lse.dtype == torch.float32
    assert_within_rounding(lse, want[1], c=4.0 + 4.0 * span / finite, context=f"lse; {context}")


def with_keys(dense: list[Dense], length: int) -> list[Dense]:
    """The same sequences with no key from ``length`` on."""
    return [
        replace(s, **{n: x[:length] for n in ("k", "v", "k_scale", "v_scale") if (x := getattr(s, n)) is not None})
        for s in dense
    ]


def spread(tensor: Tensor) -> Tensor:
    """The same values with the last row past 2^31 elements, three rows at least so that the stride fits int32."""
    assert len(tensor) > 2
    stride = (2**31 + 16) // (len(tensor) - 1) // 16 * 16 + 16
    storage = untouched(stride * (len(tensor) - 1) + tensor[0].numel(), tensor.dtype)
    return storage.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride())).copy_(tensor)


def far_pages(pages: Tensor) -> tuple[Tensor, int]:
    """(the same pages at the end of a pool, all past 2^31 elements; the number of pages by which they moved)."""
    before = 2**31 // pages[0].numel() + 1
    pool = untouched((before + len(pages)) * pages[0].numel(), pages.dtype).view(-1, *pages.shape[1:])
    pool[before:] = pages
    return pool, before


def far_scales(fields: dict[str, Any]) -> dict[str, Any]:
    """The same call, of one sequence in one page, with its scales past 2^31 elements; all pages lie in one place."""
    page = int(fields["block_table"][0, 0])
    width = fields["k_scale"][0].numel()
    num_pages = 2**31 // width + 2
    both = untouched((num_pages + 1) * width, torch.float32)
    moved = {"block_table": int32(np.array([[num_pages - 1]]))}
    for name, part in (("k", both[:-width]), ("v", both[width:])):
        pages, scale = fields[f"{name}_pages"], fields[f"{name}_scale"]
        moved[f"{name}_pages"] = pages[page : page + 1].expand(num_pages, -1, -1, -1)
        moved[f"{name}_scale"] = part.view(num_pages, *scale.shape[1:])
        moved[f"{name}_scale"][-1] = scale[page]
    return fields | moved


def untouched(numel: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, or zeros on the CPU, which take no memory until they are written."""
    if DEVICE.type == "cuda":
        return torch.empty(numel, dtype=dtype, device=DEVICE)
    return torch.from_numpy(
        np.memmap("/dev/zero", dtype=torch.empty(0, dtype=dtype).numpy().dtype, mode="c", shape=numel)
    )
