"""Generated changes that no test can notice, each with the reason; reviewed by hand.

By function, line and changed line, so that an entry holds wherever its line stands. An entry whose line is gone is
stale: test_mutants.py finds it.
"""

from __future__ import annotations

NOT_STORED = "What is loaded in place of a masked element is not stored."
TIMES_ZERO = "It meets a weight of 0."
CHOSEN_AWAY = "The other branch of tl.where is chosen then."
MASKED_ALIKE = "More tiles are masked than need be, and masked tiles give the same bits."
PROMOTED = "The other term is int64."

# (function, line, changed line) -> why every result stays the same
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "tanh",
        "return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))",
        "return tl.where(tl.abs(x) <= 0.625, small, tl.where(x < 0, -large, large))",
    ): "At 0.625 both formulas hold to float32 rounding.",
    (
        "tanh",
        "return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))",
        "return tl.where(tl.abs(x) < 0.625, small, tl.where(x <= 0, -large, large))",
    ): "0 takes the other branch.",
    (
        "load_columns",
        "if block_dim(HEAD_DIM) > HEAD_DIM:",
        "if block_dim(HEAD_DIM) >= HEAD_DIM:",
    ): "A mask of columns that all exist.",
    (
        "load_columns",
        "tile = tl.load(ptrs, mask=mask_rows[:, None], other=0.0)",
        "tile = tl.load(ptrs, mask=mask_rows[:, None], other=1.0)",
    ): "Masked keys are invisible and have weight 0; masked queries are not stored.",
    (
        "attend",
        "scores *= tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=0.0)[None, :]",
        "scores *= tl.load(k_scale_ptr + scale_rows)[None, :]",
    ): "A masked key is invisible whatever its score; its place lies in a page that is there.",
    (
        "attend",
        "scores *= tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=0.0)[None, :]",
        "scores *= tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=1.0)[None, :]",
    ): "A masked key is invisible whatever its score.",
    (
        "attend",
        "v_scale = tl.load(v_scale_ptr + scale_rows, mask=mask_keys, other=0.0)",
        "v_scale = tl.load(v_scale_ptr + scale_rows, mask=mask_keys, other=1.0)",
    ): "A masked key has weight 0.",
    (
        "attend",
        "page = tl.load(block_table_ptr + (keys >> kv.page_shift), mask=mask_keys, other=0).to(tl.int64)",
        "page = tl.load(block_table_ptr + (keys >> kv.page_shift), mask=mask_keys, other=1).to(tl.int64)",
    ): "The rows of masked keys are not read.",
    (
        "attend",
        'shift = tl.where(new_max == float("-inf"), 0.0, new_max)',
        'shift = tl.where(new_max == float("-inf"), 1.0, new_max)',
    ): "exp2(-inf) is 0 whatever is subtracted.",
    (
        "normalized",
        "return tl.where(unseen[:, None], 0.0, state.acc / tl.where(unseen, 1.0, total)[:, None])",
        "return tl.where(unseen[:, None], 0.0, state.acc / tl.where(unseen, 2.0, total)[:, None])",
    ): CHOSEN_AWAY,
    (
        "log2_sum",
        'return tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))',
        'return tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 0.0, 2.0, row_sum)))',
    ): CHOSEN_AWAY,
    (
        "log2_sum",
        'return tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))',
        'return tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 1.0, 1.0, row_sum)))',
    ): "log2(1) is log2 of the 1 in its place; log2(0) is chosen away.",
    (
        "merge_splits",
        'shift = tl.where(top == float("-inf"), 0.0, top)',
        'shift = tl.where(top == float("-inf"), 1.0, top)',
    ): "exp2(-inf) is 0 whatever is subtracted.",
    (
        "merge_splits",
        "acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]",
        "acc = acc / tl.where(total == 0.0, 2.0, total)[:, None]",
    ): "What is divided is 0 then.",
    (
        "merge_splits",
        'value = tl.load(out_ptrs + i * HEAD_DIM, mask=here, other=0.0, cache_modifier=".cg")',
        'value = tl.load(out_ptrs + i * HEAD_DIM, mask=here, other=1.0, cache_modifier=".cg")',
    ): "Masked splits have weight 0, masked columns are not stored.",
    (
        "_attention_prefill_kernel",
        "if first_row >= num_rows:",
        "if first_row > num_rows:",
    ): "A block that starts at the end stores nothing.",
    (
        "_attention_prefill_kernel",
        "diagonal = tl.maximum(nearest + 1, 0) // BLOCK_N * BLOCK_N",
        "diagonal = tl.maximum(nearest - 1, 0) // BLOCK_N * BLOCK_N",
    ): MASKED_ALIKE,
    (
        "_attention_prefill_kernel",
        "diagonal = tl.maximum(nearest + 1, 0) // BLOCK_N * BLOCK_N",
        "diagonal = tl.maximum(nearest + 1, 1) // BLOCK_N * BLOCK_N",
    ): "1 // BLOCK_N is 0, as 0 // BLOCK_N is.",
    (
        "_attention_prefill_kernel",
        "whole = tl.cdiv(tl.maximum(farthest + 1, rule.window) - rule.window, BLOCK_N) * BLOCK_N",
        "whole = tl.cdiv(tl.maximum(farthest + 2, rule.window) - rule.window, BLOCK_N) * BLOCK_N",
    ): MASKED_ALIKE,
    (
        "_attention_prefill_kernel",
        "whole = tl.cdiv(tl.maximum(farthest + 1, rule.window) - rule.window, BLOCK_N) * BLOCK_N",
        "whole = tl.cdiv(tl.maximum(farthest + 1, rule.window) + rule.window, BLOCK_N) * BLOCK_N",
    ): MASKED_ALIKE,
    (
        "_attention_prefill_kernel",
        "rule, HEAD_DIM, BLOCK_N, False, ONE_PAGE,",
        "rule, HEAD_DIM, BLOCK_N, True, ONE_PAGE,",
    ): MASKED_ALIKE,
    (
        "_embedding_kernel",
        "offs_n = tl.load(token_ids_ptr + token).to(tl.int64) + tl.zeros([1], tl.int64)",
        "offs_n = tl.load(token_ids_ptr + token).to(tl.int64) - tl.zeros([1], tl.int64)",
    ): "Plus or minus 0.",
    (
        "_embedding_kernel",
        "offs_n = tl.load(token_ids_ptr + token).to(tl.int64) + tl.zeros([1], tl.int64)",
        "offs_n = tl.load(token_ids_ptr + token) + tl.zeros([1], tl.int64)",
    ): PROMOTED,
    (
        "_embedding_kernel",
        "offs_n = tl.load(token_ids_ptr + token).to(tl.int64) + tl.zeros([1], tl.int64)",
        "offs_n = tl.load(token_ids_ptr + token).to(tl.int64) + tl.zeros([1], tl.int32)",
    ): PROMOTED,
    (
        "_gated_kernel",
        "gate = tl.load(gate_ptr + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)",
        "gate = tl.load(gate_ptr + row * gate_stride + offs, mask=mask, other=1.0).to(tl.float32)",
    ): NOT_STORED,
    (
        "_gated_kernel",
        "up = tl.load(up_ptr + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)",
        "up = tl.load(up_ptr + row * up_stride + offs, mask=mask, other=1.0).to(tl.float32)",
    ): NOT_STORED,
    (
        "_rms_norm_kernel",
        "weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)",
        "weight = tl.load(weight_ptr + offs, mask=mask, other=1.0).to(tl.float32)",
    ): NOT_STORED,
    ("_gather_kv_kernel", "if first_key < seq_len:", "if first_key <= seq_len:"): "No key is left for that page.",
    ("_gather_kv_kernel", "out_key = first_key.to(tl.int64)", "out_key = first_key"): PROMOTED,
    (
        "_gather_kv_kernel",
        "x = tl.load(kv.k_pages + offs_rows[:, None] + offs[None, :], mask=mask, other=0)",
        "x = tl.load(kv.k_pages + offs_rows[:, None] + offs[None, :], mask=mask, other=1)",
    ): NOT_STORED,
    (
        "_gather_kv_kernel",
        "scale = tl.load(kv.k_scale + scale_row + rows, mask=mask_rows, other=0.0)",
        "scale = tl.load(kv.k_scale + scale_row + rows, mask=mask_rows, other=1.0)",
    ): NOT_STORED,
    (
        "encode",
        "divisor = tl.where(scale > 0.0, scale, 1.0)",
        "divisor = tl.where(scale > 0.0, scale, 2.0)",
    ): "Under a scale of 0 lie values that round to code 0 either way, under NaN any code does.",
    (
        "encode",
        "codes = (tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)",
        "codes = (tl.where(magnitude <= 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)",
    ): "2^-6 has the same code either way.",
    (
        "encode",
        "codes = (tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)",
        "codes = (tl.where(magnitude < 0x3c800001, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)",
    ): "2^-6 has the same code either way.",
    (
        "largest_magnitude",
        "return tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)",
        "return tl.max(tl.abs(x), axis=1) - tl.sum(x * 0.0, axis=1)",
    ): "The sum is 0 or NaN.",
    (
        "to_fixed_point",
        "largest = tl.minimum(tl.max(magnitude, axis=1), 0x7F800000)",
        "largest = tl.minimum(tl.max(magnitude, axis=1), 0x7f800001)",
    ): "The exponent is 255 either way.",
    (
        "load_low",
        "i = tl.arange(0, 32 // BITS)",
        "i = tl.arange(0, 33 // BITS)",
    ): "BITS is 2, 4 or 8.",
    (
        "load_high",
        "per_low_word: tl.constexpr = 32 // LOW_BITS",
        "per_low_word: tl.constexpr = 33 // LOW_BITS",
    ): "LOW_BITS is 2, 4 or 8.",
    (
        "multiply_tile",
        "for step in tl.range(0, (columns + BLOCK_K - 1) // BLOCK_K):",
        "for step in tl.range(0, (columns + BLOCK_K - 2) // BLOCK_K):",
    ): "columns and BLOCK_K are multiples of 32.",
    (
        "multiply_tile",
        "x *= tl.load(activations.norm + offs_k, mask=mask_k, other=0.0).to(tl.float32)",
        "x *= tl.load(activations.norm + offs_k, mask=mask_k, other=1.0).to(tl.float32)",
    ): "x is 0 there.",
    (
        "_load_per_group",
        "if PER_BLOCK > 1 and BLOCK_K % LAYOUT.quant_block == 0:",
        "if PER_BLOCK >= 1 and BLOCK_K % LAYOUT.quant_block == 0:",
    ): "With one group per block both branches load the same.",
    (
        "_load_per_group",
        "if PER_BLOCK > 1 and BLOCK_K % LAYOUT.quant_block == 0:",
        "if PER_BLOCK > 2 and BLOCK_K % LAYOUT.quant_block == 0:",
    ): "PER_BLOCK is 1, 8 or 16.",
    (
        "multiply_tile",
        "offs_m = tl.full([1], token, tl.int64)",
        "offs_m = tl.full([1], token, tl.int32)",
    ): "The token is 0 or 1, times less than 2^31 rows.",
    (
        "multiply_tile",
        "if columns > BLOCK_K:",
        "if columns >= BLOCK_K:",
    ): "A tile beyond the last is masked, and not used.",
    (
        "_gemv_kernel",
        "x *= tl.load(activations.norm + offs_k, mask=offs_k < columns, other=0.0).to(tl.float32)[None, :]",
        "x *= tl.load(activations.norm + offs_k, mask=offs_k < columns, other=1.0).to(tl.float32)[None, :]",
    ): "x is 0 there.",
    ("_dot_kernel", "other=0.0,", "other=1.0,"): TIMES_ZERO,
    ("load_words", "other=0,", "other=1,"): "The scale is 0 there.",
    (
        "load_values",
        "values = tl.load(planes.low + offs_n[:, None] * columns + offs_k[None, :], mask=mask, other=0)",
        "values = tl.load(planes.low + offs_n[:, None] * columns + offs_k[None, :], mask=mask, other=1)",
    ): "x is 0 there, or the row is not stored.",
    (
        "_load_per_group",
        "d = tl.load(d_ptr + offs_n[:, None] * num_blocks + offs_b[None, :], mask=mask_b, other=0.0)",
        "d = tl.load(d_ptr + offs_n[:, None] * num_blocks + offs_b[None, :], mask=mask_b, other=1.0)",
    ): "x is 0 there, or the row is not stored.",
    (
        "_load_per_group",
        "d = tl.load(d_ptr + offs_n[:, None] * num_blocks + (offs_g // PER_BLOCK)[None, :], mask=mask, other=0.0)",
        "d = tl.load(d_ptr + offs_n[:, None] * num_blocks + (offs_g // PER_BLOCK)[None, :], mask=mask, other=1.0)",
    ): "x is 0 there, or the row is not stored.",
    (
        "_load_per_group",
        "own = tl.load(own_ptr + offs_n[:, None] * (num_blocks * PER_BLOCK) + offs_g[None, :], mask=mask, other=0)",
        "own = tl.load(own_ptr + offs_n[:, None] * (num_blocks * PER_BLOCK) + offs_g[None, :], mask=mask, other=1)",
    ): "d is 0 there.",
    (
        "store_tile",
        "total += tl.load(output.bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]",
        "total += tl.load(output.bias + offs_n, mask=mask_n, other=1.0).to(tl.float32)[None, :]",
    ): NOT_STORED,
    (
        "store_tile",
        "total += tl.load(output.residual + offs, mask=mask, other=0.0).to(tl.float32)",
        "total += tl.load(output.residual + offs, mask=mask, other=1.0).to(tl.float32)",
    ): NOT_STORED,
    (
        "load_angles",
        "cos = tl.load(angles.cos + row + offs, mask=offs < HALF, other=0.0)",
        "cos = tl.load(angles.cos + row + offs, mask=offs < HALF, other=1.0)",
    ): "The pairs it turns are 0.",
    (
        "load_angles",
        "sin = tl.load(angles.sin + row + offs, mask=offs < HALF, other=0.0)",
        "sin = tl.load(angles.sin + row + offs, mask=offs < HALF, other=1.0)",
    ): "The pairs it turns are 0.",
    (
        "_norm",
        "row, one = tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)",
        "row, one = tl.zeros([1], tl.int32), tl.full([1], True, tl.int1)",
    ): "An offset of 0.",
    (
        "_larger",
        "return tl.maximum(a, b) + (a + b) * 0.0",
        "return tl.maximum(a, b) - (a + b) * 0.0",
    ): "The product is 0 or NaN.",
    (
        "_larger",
        "return tl.maximum(a, b) + (a + b) * 0.0",
        "return tl.maximum(a, b) + (a - b) * 0.0",
    ): "The product is NaN if either is no finite number, else 0.",
    (
        "_max_kernel",
        'largest = tl.max(tl.where(logits != logits, float("-inf"), logits))',
        'largest = tl.max(tl.where(logits != logits, float("inf"), logits))',
    ): "A row with a NaN gives -1 whatever its maximum.",
    (
        "_max_kernel",
        "tl.store(floor_ptr + row, 0)",
        "tl.store(floor_ptr + row, 1)",
    ): "Only a NaN has the image 0.",
    (
        "_choose_kernel",
        'score = tl.where(logits != logits, float("-inf"), logits)',
        'score = tl.where(logits != logits, float("inf"), logits)',
    ): "A row with a NaN gives -1 whatever its winner.",
    (
        "_choose_kernel",
        "tl.store(winners_ptr + row * num_chunks + chunk, tl.where(has_nan, -1, winner))",
        "tl.store(winners_ptr + row * num_chunks + chunk, tl.where(has_nan, -2, winner))",
    ): "Any negative number says that there was a NaN.",
    (
        "_last_kernel",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
    ): "At most 65,535 rows of 2^14 chunks: below 2^31.",
    (
        "_last_kernel",
        "winners = tl.load(winners_ptr + row * num_chunks + offs, mask=mask, other=0)",
        "winners = tl.load(winners_ptr + row * num_chunks + offs, mask=mask, other=1)",
    ): "Only the winner of the best chunk is taken, and only a sign looked at.",
    (
        "_resume_search",
        "digit = tl.min(tl.where(weight_above < bound, digits, _DIGITS - 1))",
        "digit = tl.min(tl.where(weight_above < bound, digits, _DIGITS + 1))",
    ): "The largest digit always has less above it than the bound.",
    ("_narrow_kernel", "if LEVEL > 0:", "if LEVEL >= 0:"): "All 32 bits shifted out leave 0, the prefix of level 0.",
    (
        "_narrow_kernel",
        "candidate = (offs < vocab_size) & (image >= tl.load(floor_ptr + row).to(tl.uint32))",
        "candidate = (offs <= vocab_size) & (image >= tl.load(floor_ptr + row).to(tl.uint32))",
    ): "-inf stands there: it adds to no weight above another value.",
    (
        "_penalise_kernel",
        "logits = tl.load(logits_ptr + row * logits_stride + offs, mask=mask, other=0.0)",
        "logits = tl.load(logits_ptr + row * logits_stride + offs, mask=mask, other=1.0)",
    ): NOT_STORED,
    (
        "_penalise_kernel",
        "seen = tl.load(seen_ptr + row * seen_stride + offs, mask=mask, other=0)",
        "seen = tl.load(seen_ptr + row * seen_stride + offs, mask=mask, other=1)",
    ): NOT_STORED,
    (
        "_penalise_kernel",
        "repeated = tl.where(logits < 0.0, logits * repetition, tl.div_rn(logits, repetition))",
        "repeated = tl.where(logits <= 0.0, logits * repetition, tl.div_rn(logits, repetition))",
    ): "0 times or over the penalty is 0.",
}
