"""What write_kv, gather_kv and copy_pages refuse."""

import pytest
import torch

from rooflama.kernels import KernelInputError, copy_pages, gather_kv, write_kv
from rooflama.testing.strategies import DEVICE

ZEROS = torch.zeros(2, 3, 16, device=DEVICE)
PAGES = torch.zeros(4, 16, 3, 16, device=DEVICE)
SLOTS = torch.zeros(2, dtype=torch.int64, device=DEVICE)
SCALES = torch.zeros(4, 16, 3, device=DEVICE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ZEROS, ZEROS, PAGES, PAGES, SLOTS.int()), "slot_mapping must be one of int64"),
        ((ZEROS, ZEROS, PAGES, PAGES, SLOTS[:1]), r"slot_mapping must have shape \[2\]"),
        ((ZEROS, ZEROS, PAGES, PAGES, SLOTS.repeat(2)[::2]), "last dimension of slot_mapping must be contiguous"),
        ((ZEROS, ZEROS[:, :2], PAGES, PAGES, SLOTS), r"v must have shape \[2, 3, 16\]"),
        ((ZEROS, ZEROS.half(), PAGES, PAGES, SLOTS), "v must be one of float32"),
        ((ZEROS, ZEROS, PAGES, PAGES.half(), SLOTS), "v_pages must be one of float32"),
        ((ZEROS, ZEROS, PAGES.double(), PAGES.double(), SLOTS), "k_pages is torch.float64"),
        ((ZEROS, ZEROS, PAGES[:, :12], PAGES[:, :12], SLOTS), "page_size is 12"),
        ((ZEROS, ZEROS, PAGES, PAGES.mT.contiguous().mT, SLOTS), "last dimension of v_pages must be contiguous"),
        ((ZEROS, ZEROS, PAGES, torch.zeros(4, 2, 16, 3, 16, device=DEVICE)[:, 0], SLOTS), "must be laid out alike"),
        ((ZEROS, ZEROS, PAGES.char(), PAGES.char(), SLOTS), "int8 and float8 pages come with scales"),
        ((ZEROS, ZEROS, PAGES, PAGES, SLOTS, SCALES, SCALES), "float pages without"),
        ((ZEROS, ZEROS, PAGES.char(), PAGES.char(), SLOTS, SCALES, SCALES.half()), "v_scale is torch.float16"),
        ((ZEROS, ZEROS, PAGES.char(), PAGES.char(), SLOTS, SCALES[:3], SCALES), "k_scale must have shape"),
    ],
)
def test_bad_write_is_refused_before_a_launch(arguments, message):
    with pytest.raises(KernelInputError, match=message):
        write_kv(*arguments)


@pytest.mark.parametrize(
    ("table", "lengths", "message"),
    [
        (torch.zeros(1, 2), torch.ones(1).int(), "block_table must be one of int32"),
        (torch.zeros(1, 2).int(), torch.ones(2).int(), r"seq_lens must have shape \[1\]"),
        (torch.zeros(1, 2).int(), torch.ones(1), "seq_lens must be one of int32"),
        (SLOTS.int().repeat(2)[None, ::2], torch.ones(1).int(), "last dimension of block_table must be contiguous"),
        (torch.zeros(2, 2).int(), SLOTS.int().repeat(2)[::2], "last dimension of seq_lens must be contiguous"),
    ],
)
def test_bad_gather_is_refused_before_a_launch(table, lengths, message):
    with pytest.raises(KernelInputError, match=message):
        gather_kv(PAGES.to(DEVICE), table.to(DEVICE), lengths.to(DEVICE), num_keys=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float8_e4m3fn])
def test_keys_are_not_gathered_as_other_than_floats(dtype):
    table, one = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelInputError, match=f"dtype is {dtype}: keys become float32, float16 or bfloat16"):
        gather_kv(PAGES, table, one, num_keys=1, dtype=dtype)
    with pytest.raises(KernelInputError, match="num_keys is -1"):
        gather_kv(PAGES, table, one, num_keys=-1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard concerns the interpreter only")
def test_bfloat16_is_refused_under_the_interpreter():
    """Where it is computed with; a copy moves bits."""
    table, one, bfloat16 = torch.zeros(1, 2).int(), torch.ones(1).int(), torch.bfloat16
    for call in (
        lambda: write_kv(ZEROS.to(bfloat16), ZEROS.to(bfloat16), PAGES, PAGES, SLOTS),
        lambda: write_kv(ZEROS, ZEROS, PAGES.to(bfloat16), PAGES.to(bfloat16), SLOTS),
        lambda: gather_kv(PAGES.to(bfloat16), table, one, num_keys=1, dtype=torch.float32),
        lambda: gather_kv(PAGES, table, one, num_keys=1, dtype=bfloat16),
    ):
        with pytest.raises(KernelInputError, match="interpreter computes bfloat16 wrongly"):
            call()


def test_codes_without_scales_are_not_gathered():
    table, one = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelInputError, match=r"^scale is None with torch\.int8 pages"):
        gather_kv(PAGES.char(), table, one, num_keys=1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's indices are not read back for a check")
def test_indices_out_of_range_are_refused():
    table, one = torch.zeros(1, 2).int(), torch.ones(1).int()
    with pytest.raises(KernelInputError, match="slots are numbered 0 to 63"):
        write_kv(ZEROS, ZEROS, PAGES, PAGES, torch.tensor([0, 64]))
    with pytest.raises(KernelInputError, match="pages are numbered 0 to 3"):
        gather_kv(PAGES, table + 4, one, num_keys=1)
    with pytest.raises(KernelInputError, match="a sequence has 0 to 32 keys"):
        gather_kv(PAGES, table, one * 33, num_keys=33)
    with pytest.raises(KernelInputError, match="the sum of seq_lens is 1"):
        gather_kv(PAGES, table, one, num_keys=2)
    for source, target, message in (
        ([4], [0], "pages are numbered"),
        ([0, 1], [2, 2], "written once"),
        ([0], [0], "both"),
    ):
        with pytest.raises(KernelInputError, match=message):
            copy_pages(PAGES, torch.tensor(source), torch.tensor(target))


def test_pages_to_copy_and_their_numbers_are_contiguous():
    wide = torch.arange(4, device=DEVICE)
    with pytest.raises(KernelInputError, match="each page is contiguous"):
        copy_pages(PAGES[:, :, :, :8], SLOTS, SLOTS + 1)
    with pytest.raises(KernelInputError, match="last dimension of source must be contiguous"):
        copy_pages(PAGES, wide[::2], wide[:2])
    with pytest.raises(KernelInputError, match="last dimension of target must be contiguous"):
        copy_pages(PAGES, wide[:2], wide[::2])
