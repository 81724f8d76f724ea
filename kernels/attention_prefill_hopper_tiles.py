"""What the roles of ``attention_prefill_hopper`` share: blocks of rows, rings of K/V tiles, and how a tile arrives.

Parts: a tile [BLOCK_N, head_dim] lies in shared memory as parts whose widths are powers of two: 64 + 32 for 96.
Padding goes to the next such sum, with zeros: columns past head_dim arrive as 0.
Boxes: wgmma reads rows swizzled in 128 bytes, so columns lie in runs of 64, one run after another. A run is filled by
boxes [rows of one page, 64 columns]: one where a page holds the whole tile, several pages' otherwise. A box of page -1
arrives as 0.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .attention_prefill_blocks import Sequences, find_sequence, first_block

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6, and since


class Work(NamedTuple):
    """The batch, and how it is cut into blocks."""

    sequences: Sequences
    block_table_stride: gl.tensor
    num_tokens: gl.tensor
    num_seqs: gl.tensor
    num_blocks: gl.tensor  # of each K/V head
    num_kv_heads: gl.constexpr
    group: gl.constexpr  # query heads per K/V head
    page_shift: gl.tensor  # log2(page_size)
    window: gl.tensor | None  # keys that a query sees, its own included


class Block(NamedTuple):
    """BLOCK_M rows of one sequence and one K/V head, and the tiles of keys that they meet."""

    there: gl.tensor  # whether it has a row
    sequence: gl.tensor
    kv_head: gl.tensor
    query_start: gl.tensor  # token of the sequence's first query
    query_position: gl.tensor  # and its position
    first_row: gl.tensor
    num_rows: gl.tensor  # of the sequence
    start: gl.tensor  # first tile, counted from the sequence's key 0
    whole: gl.tensor  # from here to diagonal, every row sees every key
    diagonal: gl.tensor
    end: gl.tensor  # past the last tile
    first_key: gl.tensor  # keys before it are out of reach
    end_key: gl.tensor  # and the sequence has none from here on


class Rings(NamedTuple):
    """K/V tiles in shared memory, where they come from, and the barriers by which the roles wait for one another."""

    k_boxes: tuple  # of each part: a descriptor of the pages
    v_boxes: tuple
    k: tuple  # of each part: [STAGES, BLOCK_N, width]
    v: tuple
    k_full: gl.shared_memory_descriptor  # [STAGES, 1]: the tile has arrived
    v_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor  # [STAGES, 1]: every consumer is done with the tile
    v_empty: gl.shared_memory_descriptor
    turns: gl.shared_memory_descriptor  # [CONSUMERS, 1]: the consumer may issue products


@gluon.constexpr_function
def part_widths(head_dim):
    """64 columns and the least power of two, from 16 on, that holds the rest; 128 in one part."""
    rest = triton.next_power_of_2(head_dim - 64) if head_dim > 64 else 0
    return (64,) if rest == 0 else (128,) if rest == 64 else (64, max(16, rest))


@gluon.constexpr_function
def columns_before(head_dim, part):
    return sum(part_widths(head_dim)[:part])


@gluon.constexpr_function
def tile_layout(width, rank=2):
    """How wgmma reads a part of this width, and boxes fill it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=rank)


@gluon.constexpr_function
def row_layout(width):
    """[rows, width] over a warpgroup's threads, each with eight neighbours of a row."""
    lanes = width // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def allocate_part(DTYPE: gl.constexpr, NUM: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    return gl.allocate_shared_memory(DTYPE, [NUM, ROWS, WIDTH], tile_layout(WIDTH))


@gluon.jit
def allocate_tiles(DTYPE: gl.constexpr, NUM: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Of each part: [NUM, ROWS, width]."""
    parts = ()
    for part in gl.static_range(part_widths(HEAD_DIM).__len__()):
        parts += (allocate_part(DTYPE, NUM, ROWS, part_widths(HEAD_DIM)[part]),)
    return parts


@gluon.jit
def log2_page_size(page_size):
    """4 to 8."""
    shift = 4
    for more in gl.static_range(5, 9):
        shift += (page_size >= 1 << more).to(gl.int32)
    return shift


@gluon.jit
def take_block(turn, work, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The block that this program takes in its ``turn``. Programs take blocks in order, every other time reversed."""
    program = gl.program_id(0)
    if turn % 2 == 1:
        program = gl.num_programs(0) - 1 - program
    index = turn * gl.num_programs(0) + program
    block = work.num_blocks - 1 - index // work.num_kv_heads
    query_start_loc = work.sequences.query_start_loc
    sequence = find_sequence(query_start_loc, block, work.num_seqs, work.group, BLOCK_M)
    query_start = gl.load(query_start_loc + sequence)
    query_end = work.num_tokens
    seq_len = 0
    if sequence < work.num_seqs:
        query_end = gl.load(query_start_loc + sequence + 1)
        seq_len = gl.load(work.sequences.seq_lens + sequence)
    num_rows = (query_end - query_start) * work.group
    first_row = (block - first_block(query_start_loc, sequence, work.group, BLOCK_M)) * BLOCK_M
    query_position = seq_len - (query_end - query_start)
    nearest = query_position + first_row // work.group
    farthest = query_position + (gl.minimum(first_row + BLOCK_M, num_rows) - 1) // work.group

    first_key = 0
    start = 0
    whole = 0
    diagonal = gl.maximum(nearest + 1, 0) // BLOCK_N
    if work.window is not None:
        first_key = gl.maximum(nearest + 1, work.window) - work.window
        start = first_key // BLOCK_N
        whole = gl.cdiv(gl.maximum(farthest + 1, work.window) - work.window, BLOCK_N)
        whole = gl.minimum(whole, diagonal)
    end = gl.maximum(gl.cdiv(farthest + 1, BLOCK_N), start + 1)  # one tile even for rows without a key
    there = (block >= 0) & (first_row < num_rows)
    return Block(
        there, sequence, index % work.num_kv_heads, query_start, query_position, first_row, num_rows,
        start, whole, diagonal, end, first_key, seq_len,
    )  # fmt: skip


@gluon.jit
def pages_of(tile, block, work, BLOCK_N: gl.constexpr, BOX: gl.constexpr):
    """The pages of a tile's boxes of BOX rows; -1 for a box without a key in reach."""
    block_table_ptr = work.sequences.block_table + gl.cast(block.sequence, gl.int64) * work.block_table_stride
    first = tile * BLOCK_N >> work.page_shift
    pages = ()
    for i in gl.static_range(BLOCK_N // BOX):
        key = tile * BLOCK_N + i * BOX
        in_reach = (key + BOX > block.first_key) & (key < block.end_key)
        pages += (gl.load(block_table_ptr + first + i, mask=in_reach, other=-1),)
    return pages


@gluon.jit
def _fill_part(box, tiles, full, stage, pages, kv_head, slot, FIRST: gl.constexpr):
    ROWS: gl.constexpr = box.block_shape[2]
    COLUMNS: gl.constexpr = box.block_shape[3]
    DOWN: gl.constexpr = tiles.shape[1] // ROWS
    ACROSS: gl.constexpr = tiles.shape[2] // COLUMNS
    # the same bytes as boxes: of a stage, of a run of columns, from the first rows to the last
    places = tiles._reinterpret(tiles.dtype, [tiles.shape[0] * ACROSS * DOWN, 1, 1, ROWS, COLUMNS], box.layout)
    for i in gl.static_range(DOWN):
        for j in gl.static_range(ACROSS):
            place = places.index((stage * ACROSS + j) * DOWN + i)
            where = [pages[i], kv_head, slot, FIRST + j * COLUMNS]
            tma.async_copy_global_to_shared(box, where, full.index(stage), place)


@gluon.jit
def fill(
    boxes,  # of each part: a descriptor
    tiles,  # of each part: a ring
    full,
    number,  # of the tile, counted from the program's first
    pages,  # of the tile's boxes
    tile,  # counted from the sequence's key 0
    block,
    work,
    HEAD_DIM: gl.constexpr,
):
    """Starts to copy one tile. Its place in the rings must be free."""
    stage = number % full.shape[0]
    slot = tile * tiles[0].shape[1] & ((1 << work.page_shift) - 1)  # 0 if the tile has several boxes, of whole pages
    mbarrier.expect(full.index(stage), 2 * tiles[0].shape[1] * columns_before(HEAD_DIM, len(tiles)))
    for part in gl.static_range(len(tiles)):
        _fill_part(boxes[part], tiles[part], full, stage, pages, block.kv_head, slot, columns_before(HEAD_DIM, part))


@gluon.jit
def _clear_part(tile, first_key, end_key):
    ROWS: gl.constexpr = min(tile.shape[0], 2048 // tile.shape[1])
    LAYOUT: gl.constexpr = row_layout(tile.shape[1])
    for i in gl.static_range(tile.shape[0] // ROWS):
        keys = i * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        in_reach = (keys >= first_key) & (keys < end_key)
        rows = tile.slice(i * ROWS, ROWS, dim=0)
        values = rows.load(LAYOUT)
        rows.store(gl.where(in_reach[:, None], values, gl.zeros_like(values)))


@gluon.jit
def clear(tiles, stage, tile, block):
    """Zeros where a tile of V holds no value that a row may see. All consumers write the same."""
    BLOCK_N: gl.constexpr = tiles[0].shape[1]
    first_key = block.first_key - tile * BLOCK_N
    end_key = block.end_key - tile * BLOCK_N
    if (first_key > 0) | (end_key < BLOCK_N):
        for part in gl.static_range(len(tiles)):
            _clear_part(tiles[part].index(stage), first_key, end_key)
        fence_async_shared()
        thread_barrier()
