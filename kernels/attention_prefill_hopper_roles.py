"""The two roles of ``attention_prefill_hopper``: a producer, which loads, and consumers, which multiply."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_common import log2_sum, natural
from .attention_prefill_hopper_softmax import (
    Softmax,
    add_sums,
    as_operand,
    decayed,
    maxima,
    no_maxima,
    no_products,
    no_sums,
    normalized,
    packed,
    powers,
    product_layout,
    sum_in_lanes,
)
from .attention_prefill_hopper_tiles import (
    clear,
    columns_before,
    fill,
    pages_of,
    row_layout,
    take_block,
    thread_barrier,
)

ROWS = 64  # of one consumer: what one wgmma of one warpgroup multiplies
_ROWS = gl.constexpr(ROWS)


@gluon.jit
def produce(work, rings, num_turns, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Fills the rings with the tiles of this program's blocks, as soon as places are free."""
    STAGES: gl.constexpr = rings.k_full.shape[0]
    BLOCK_N: gl.constexpr = rings.k[0].shape[1]
    BOX: gl.constexpr = rings.k_boxes[0].block_shape[2]
    number = 0  # of the tile, counted from the program's first
    for turn in range(num_turns):
        block = take_block(turn, work, BLOCK_M, BLOCK_N)
        if block.there:
            for tile in range(block.start, block.end):
                pages = pages_of(tile, block, work, BLOCK_N, BOX)
                free = (number // STAGES + 1) & 1
                mbarrier.wait(rings.k_empty.index(number % STAGES), free)
                fill(rings.k_boxes, rings.k, rings.k_full, number, pages, tile, block, work, HEAD_DIM)
                mbarrier.wait(rings.v_empty.index(number % STAGES), free)
                fill(rings.v_boxes, rings.v, rings.v_full, number, pages, tile, block, work, HEAD_DIM)
                number += 1


@gluon.jit
def _wait_full(full, number):
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(number % STAGES), (number // STAGES) & 1)


@gluon.jit
def _wait_turn(rings, number, me: gl.constexpr):
    mbarrier.wait(rings.turns.index(me), (number + 1 - me) & 1)


@gluon.jit
def _start_scores(q_tiles, rings, number, me: gl.constexpr):
    """Starts q.k^T of a tile as soon as it has arrived."""
    STAGES: gl.constexpr = rings.k_full.shape[0]
    _wait_full(rings.k_full, number)
    scores = no_products(_ROWS, rings.k[0].shape[1])
    for part in gl.static_range(len(q_tiles)):
        k = rings.k[part].index(number % STAGES).permute((1, 0))
        scores = warpgroup_mma(q_tiles[part].index(me), k, scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def _start_values(acc, weights, rings, number):
    """Starts to add weights.v of a tile that has arrived to each part of acc."""
    STAGES: gl.constexpr = rings.v_full.shape[0]
    parts = ()
    for part in gl.static_range(len(acc)):
        v = rings.v[part].index(number % STAGES)
        operand = as_operand(weights, v.dtype, v.shape[1])
        parts += (warpgroup_mma(operand, v, acc[part], is_async=True),)
    return parts


@gluon.jit
def _wait_values(acc, weights, lane_sums):
    """acc when its products are done. The other two pass through, so that they are computed before."""
    if len(acc) == 1:
        first, weights, lane_sums = warpgroup_mma_wait(0, deps=(acc[0], weights, lane_sums))
        return (first,), weights, lane_sums
    else:
        first, second, weights, lane_sums = warpgroup_mma_wait(0, deps=(acc[0], acc[1], weights, lane_sums))
        return (first, second), weights, lane_sums


@gluon.jit
def _walk_ahead(
    state,  # Softmax
    weights,  # of the tile before start, packed
    q_tiles,
    rings,
    origin,  # number that the sequence's first tile has, or would have, among the program's
    start,  # first tile
    end,  # past the last tile
    positions,
    rule,
    me: gl.constexpr,
    MASKED: gl.constexpr,
):
    """(state, weights) after the scores of the tiles in [start, end) and the values up to the last but one."""
    STAGES: gl.constexpr = rings.k_full.shape[0]
    BLOCK_N: gl.constexpr = rings.k[0].shape[1]
    acc, row_max, lane_sums = state
    for tile in range(start, end):
        number = origin + tile
        before = number - 1
        _wait_turn(rings, number, me)
        scores = _start_scores(q_tiles, rings, number, me)
        _wait_full(rings.v_full, before)
        acc = _start_values(acc, weights, rings, before)
        mbarrier.arrive(rings.turns.index(1 - me), count=1)
        scores = warpgroup_mma_wait(len(acc), deps=(scores,))
        mbarrier.arrive(rings.k_empty.index(number % STAGES), count=1)
        scores, row_max, decay = maxima(scores, row_max, tile * BLOCK_N, positions, rule, MASKED)
        # The tile is there. But the assembler moves a wait for products up to the last branch, above the maxima that
        # are to be found beside them, and this is a branch.
        _wait_full(rings.v_full, before)
        acc, scores, decay = _wait_values(acc, scores, decay)
        mbarrier.arrive(rings.v_empty.index(before % STAGES), count=1)
        acc = decayed(acc, decay)
        next_weights = powers(scores, row_max, rule)
        lane_sums = add_sums(lane_sums, decay, next_weights)
        weights = packed(next_weights, rings.v[0].dtype)
    return Softmax(acc, row_max, lane_sums), weights


@gluon.jit
def _attend_ahead(acc, q_tiles, rings, first, block, positions, rule, me: gl.constexpr):
    """(state, weights) of a block for one of two consumers. The values of the last tile are being added."""
    STAGES: gl.constexpr = rings.k_full.shape[0]
    BLOCK_N: gl.constexpr = rings.k[0].shape[1]
    _wait_turn(rings, first, me)
    scores = _start_scores(q_tiles, rings, first, me)
    mbarrier.arrive(rings.turns.index(1 - me), count=1)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(rings.k_empty.index(first % STAGES), count=1)
    scores, row_max, _ = maxima(scores, no_maxima(_ROWS, BLOCK_N), block.start * BLOCK_N, positions, rule, True)
    first_weights = powers(scores, row_max, rule)
    state = Softmax(acc, row_max, sum_in_lanes(first_weights))
    weights = packed(first_weights, rings.v[0].dtype)
    if rule.window is not None:
        _wait_full(rings.v_full, first)
        clear(rings.v, first % STAGES, block.start, block)

    origin = first - block.start
    second = block.start + 1
    whole = gl.maximum(second, block.whole)
    diagonal = gl.maximum(second, block.diagonal)
    if rule.window is not None:
        state, weights = _walk_ahead(
            state, weights, q_tiles, rings, origin, second, block.whole, positions, rule, me, True
        )
    state, weights = _walk_ahead(state, weights, q_tiles, rings, origin, whole, diagonal, positions, rule, me, False)
    state, weights = _walk_ahead(state, weights, q_tiles, rings, origin, diagonal, block.end, positions, rule, me, True)

    last = origin + block.end - 1
    _wait_full(rings.v_full, last)
    clear(rings.v, last % STAGES, block.end - 1, block)
    return Softmax(_start_values(state.acc, weights, rings, last), state.row_max, state.lane_sums), weights


@gluon.jit
def _walk(
    state,  # Softmax
    q_tiles,
    rings,
    origin,  # as in _walk_ahead
    start,
    end,
    positions,
    block,
    rule,
    me: gl.constexpr,
    MASKED: gl.constexpr,
):
    """``state`` after the tiles in [start, end), one after another."""
    STAGES: gl.constexpr = rings.k_full.shape[0]
    BLOCK_N: gl.constexpr = rings.k[0].shape[1]
    acc, row_max, lane_sums = state
    for tile in range(start, end):
        number = origin + tile
        scores = warpgroup_mma_wait(0, deps=(_start_scores(q_tiles, rings, number, me),))
        mbarrier.arrive(rings.k_empty.index(number % STAGES), count=1)
        scores, row_max, decay = maxima(scores, row_max, tile * BLOCK_N, positions, rule, MASKED)
        weights = powers(scores, row_max, rule)
        lane_sums = add_sums(lane_sums, decay, weights)
        acc = decayed(acc, decay)
        pairs = packed(weights, rings.v[0].dtype)
        _wait_full(rings.v_full, number)
        if MASKED:
            clear(rings.v, number % STAGES, tile, block)
        acc, pairs, lane_sums = _wait_values(_start_values(acc, pairs, rings, number), pairs, lane_sums)
        mbarrier.arrive(rings.v_empty.index(number % STAGES), count=1)
    return Softmax(acc, row_max, lane_sums)


@gluon.jit
def _attend(acc, q_tiles, rings, first, block, positions, rule, me: gl.constexpr):
    """The state of a block for one of three consumers."""
    BLOCK_N: gl.constexpr = rings.k[0].shape[1]
    origin = first - block.start
    whole = gl.maximum(block.start, block.whole)
    diagonal = gl.maximum(block.start, block.diagonal)
    state = Softmax(acc, no_maxima(_ROWS, BLOCK_N), no_sums(_ROWS, BLOCK_N))
    if rule.window is not None:
        state = _walk(state, q_tiles, rings, origin, block.start, block.whole, positions, block, rule, me, True)
    state = _walk(state, q_tiles, rings, origin, whole, diagonal, positions, block, rule, me, False)
    return _walk(state, q_tiles, rings, origin, diagonal, block.end, positions, block, rule, me, True)


@gluon.jit
def _places(first_row, block, work, FIRST: gl.constexpr, WIDTH: gl.constexpr, HEAD_DIM: gl.constexpr):
    """(tokens [ROWS, 1], heads [ROWS, 1], columns [1, WIDTH], mask) of one part of a consumer's rows."""
    LAYOUT: gl.constexpr = row_layout(WIDTH)
    rows = (first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, LAYOUT)))[:, None]
    columns = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    tokens = (block.query_start + rows // work.group).to(gl.int64)
    heads = (block.kv_head * work.group + rows % work.group).to(gl.int64)
    return tokens, heads, columns, (rows < block.num_rows) & (columns < HEAD_DIM)


@gluon.jit
def _load_part(q, block, work, me: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr, HEAD_DIM: gl.constexpr):
    tokens, heads, columns, mask = _places(block.first_row + me * _ROWS, block, work, FIRST, WIDTH, HEAD_DIM)
    q_ptrs = q.ptr + tokens * q.token_stride + heads * q.head_stride + columns
    return gl.load(q_ptrs, mask=mask & block.there, other=0.0)


@gluon.jit
def _load_queries(q, q_tiles, block, work, me: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Of each part: this consumer's rows of q, in registers; 0 where the block has none."""
    parts = ()
    for part in gl.static_range(len(q_tiles)):
        parts += (_load_part(q, block, work, me, columns_before(HEAD_DIM, part), q_tiles[part].shape[2], HEAD_DIM),)
    return parts


@gluon.jit
def _store_out(out_ptr, q_tile, first_row, block, work, FIRST: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Stores what the consumer left in its tile of queries."""
    tokens, heads, columns, mask = _places(first_row, block, work, FIRST, q_tile.shape[1], HEAD_DIM)
    out_rows = tokens * (work.num_kv_heads * work.group) + heads
    gl.store(out_ptr + out_rows * HEAD_DIM + columns, q_tile.load(row_layout(q_tile.shape[1])), mask=mask)


@gluon.jit
def _store(result, state, q_tiles, block, work, me: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Stores out and lse of a block's rows. out goes through shared memory, so that whole rows are written at once."""
    first_row = block.first_row + me * _ROWS
    LAYOUT: gl.constexpr = state.row_max.type.layout
    total = gl.convert_layout(gl.sum(state.lane_sums, axis=1), LAYOUT)
    for part in gl.static_range(len(q_tiles)):
        q_tiles[part].index(me).store(normalized(state.acc[part], total).to(q_tiles[part].dtype))
    thread_barrier()
    for part in gl.static_range(len(q_tiles)):
        _store_out(
            result.out, q_tiles[part].index(me), first_row, block, work, columns_before(HEAD_DIM, part), HEAD_DIM
        )
    rows = first_row + gl.arange(0, _ROWS, layout=LAYOUT)
    tokens = (block.query_start + rows // work.group).to(gl.int64)
    lse_rows = (tokens * work.num_kv_heads + block.kv_head) * work.group + rows % work.group
    gl.store(result.lse + lse_rows, natural(log2_sum(state.row_max, total)), mask=rows < block.num_rows)
    thread_barrier()


@gluon.jit
def _recomputed(x):
    """x, but the compiler does not know it: what is computed from it is not kept in registers beside the softmax."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def consume(
    me: gl.constexpr,  # number of this consumer
    q,  # Heads
    q_tiles,  # of each part: [CONSUMERS, ROWS, width] shared
    work,
    rings,
    result,
    num_turns,
    rule,
    HEAD_DIM: gl.constexpr,
):
    """Attention of ROWS rows of each of this program's blocks."""
    CONSUMERS: gl.constexpr = q_tiles[0].shape[0]
    STAGES: gl.constexpr = rings.k_full.shape[0]
    BLOCK_N: gl.constexpr = rings.k[0].shape[1]
    LAYOUT: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    block = take_block(0, work, CONSUMERS * _ROWS, BLOCK_N)
    queries = _load_queries(q, q_tiles, block, work, me, HEAD_DIM)
    first = 0  # number of the block's first tile
    for turn in range(num_turns):
        if block.there:
            acc = ()
            for part in gl.static_range(len(q_tiles)):
                q_tiles[part].index(me).store(queries[part])
                acc += (no_products(_ROWS, q_tiles[part].shape[2]),)
            fence_async_shared()
            thread_barrier()
            first_row = block.first_row + me * _ROWS
            positions = block.query_position + (first_row + gl.arange(0, _ROWS, layout=LAYOUT)) // work.group

            last = first + block.end - block.start - 1
            if CONSUMERS == 2:
                state, weights = _attend_ahead(acc, q_tiles, rings, first, block, positions, rule, me)
            else:
                state = _attend(acc, q_tiles, rings, first, block, positions, rule, me)
            # while the last values are added
            block = take_block(_recomputed(turn), work, CONSUMERS * _ROWS, BLOCK_N)
            following = take_block(turn + 1, work, CONSUMERS * _ROWS, BLOCK_N)
            queries = _load_queries(q, q_tiles, following, work, me, HEAD_DIM)
            if CONSUMERS == 2:
                acc, weights, lane_sums = _wait_values(state.acc, weights, state.lane_sums)
                mbarrier.arrive(rings.v_empty.index(last % STAGES), count=1)
                state = Softmax(acc, state.row_max, lane_sums)
            _store(result, state, q_tiles, block, work, me, HEAD_DIM)
            first = last + 1
            block = following
        else:
            block = take_block(turn + 1, work, CONSUMERS * _ROWS, BLOCK_N)
            queries = _load_queries(q, q_tiles, block, work, me, HEAD_DIM)
