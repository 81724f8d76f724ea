"""The device boundary: copies, ownership, and what is refused. On a machine with a GPU, the tests run there."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limits import SMALL_CHUNK
from rooflama.loaders.device import (
    CopyOutOfRange,
    DeviceError,
    DeviceOutOfMemory,
    DeviceUnavailable,
    DoubleFree,
    UseAfterClose,
    open_device,
)
from rooflama.loaders.device import raw as device_raw
from rooflama.testing.strategies import DEVICE, seeds

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]


def test_round_trip_and_what_a_buffer_says(device):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    buffer = device.upload(values, label="weights")
    assert (buffer.shape, buffer.dtype, buffer.nbytes, buffer.label) == ((3, 4), torch.float32, 48, "weights")
    assert buffer.tensor.device == device.torch_device
    np.testing.assert_array_equal(device.download(buffer).numpy(), values)
    assert device.held() == (buffer,)
    assert device.held_bytes == 48
    assert repr(buffer) == f"DeviceBuffer('weights', [3, 4], torch.float32, 48 bytes on {device.torch_device})"


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    seed=seeds,
)
def test_upload_keeps_every_bit(small_chunks, shape, dtype, transposed, seed):
    """Any shape and dtype, across chunk boundaries, with NaN payloads."""
    shape = [*shape[:-1], shape[-1] * 16] if shape else []
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, math.prod(shape) * dtype.itemsize)
    source = torch.tensor(raw.tolist(), dtype=torch.uint8).view(dtype).reshape(shape)
    if transposed:
        source = source.permute(tuple(reversed(range(source.dim()))))
    moved = []
    with open_device(DEVICE) as device:
        back = device.download(device.upload(source, label="x", progress=moved.append))
    assert (back.shape, back.dtype) == (source.shape, source.dtype)
    assert bytes(device_raw.as_bytes(back).numpy()) == bytes(device_raw.as_bytes(source.contiguous()).numpy())
    assert sum(moved) == back.nbytes
    assert all(nbytes <= SMALL_CHUNK for nbytes in moved)


def test_read_only_and_mapped_arrays_upload_without_a_warning(device, tmp_path):
    values = np.arange(100, dtype=np.uint8)
    (tmp_path / "a.bin").write_bytes(values.tobytes())
    mapped = np.memmap(tmp_path / "a.bin", mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = device.upload(mapped, label="mapped")
    np.testing.assert_array_equal(device.download(buffer).numpy(), values)
    assert buffer.tensor.data_ptr() != mapped.ctypes.data


def test_borrowing(device):
    """On a CPU a borrowed buffer is the caller's memory, on a GPU a copy. Both are counted."""
    values = np.zeros(8, dtype=np.float32)
    buffer = device.upload(values, label="mine", borrow=True)
    assert (buffer.tensor.data_ptr() == values.ctypes.data) == (device.kind == "cpu")
    assert device.held_bytes == 32
    buffer.close()
    values[:] = 1  # still the caller's


def test_borrowing_needs_no_free_memory(device, monkeypatch):
    monkeypatch.setattr(type(device), "_memory", lambda self: (0, 2**30))
    buffer = device.upload(np.zeros(8, dtype=np.float32), label="mine", borrow=True)
    assert buffer.nbytes == 32
    if device.kind == "cpu":
        with pytest.raises(DeviceOutOfMemory):
            device.upload(np.zeros(8, dtype=np.float32), label="copy")


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_empty_arrays(device, dtype):
    back = device.download(device.upload(np.zeros((0, 3), dtype=dtype), label="empty"))
    assert back.numpy().shape == (0, 3)
    assert back.numpy().dtype == dtype


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(2, dtype=">f4"), r"array of >f4: uploads have a dtype of torch"),
        (np.array([None]), r"array of object"),
        (torch.zeros(2, device="meta"), r"on meta: uploads come from host memory"),
    ],
)
def test_sources_that_cannot_be_uploaded(device, source, message):
    with pytest.raises(DeviceError, match=message):
        device.upload(source, label="x")
    assert device.held_bytes == 0


def test_close_is_idempotent_and_final(device):
    buffer = device.allocate((4, 4), torch.float32, label="cache")
    buffer.close()
    buffer.close()
    assert buffer.closed
    assert device.held_bytes == 0
    for use in (
        lambda: buffer.tensor,
        lambda: device.download(buffer),
        lambda: device.copy_in(buffer, np.zeros(1, dtype=np.uint8)),
    ):
        with pytest.raises(UseAfterClose, match=r"buffer 'cache' \(64 bytes on .*\): it was closed"):
            use()


def test_free_is_refused_the_second_time(device):
    buffer = device.allocate((4,), torch.float32, label="x")
    device.free(buffer)
    with pytest.raises(DoubleFree, match=r"buffer 'x' \(16 bytes\): it was freed before"):
        device.free(buffer)
    buffer.close()  # close is idempotent however the buffer was freed
    closed = device.allocate((4,), torch.float32, label="y")
    closed.close()
    with pytest.raises(DoubleFree):
        device.free(closed)


def test_a_buffer_is_freed_by_its_own_device(device):
    with open_device("cpu") as other:
        buffer = other.allocate((4,), torch.float32, label="x")
        for use in (lambda: device.free(buffer), lambda: device.download(buffer)):
            with pytest.raises(DeviceError, match="the device that made it"):
                use()
        assert not buffer.closed


def test_a_closed_device_frees_all_and_refuses_use():
    device = open_device(DEVICE)
    buffers = [device.allocate((n,), torch.uint8, label=str(n)) for n in (1, 2, 3)]
    device.close()
    device.close()
    assert all(buffer.closed for buffer in buffers)
    assert device.held_bytes == 0
    for use in (
        lambda: device.allocate((1,), torch.uint8, label="x"),
        lambda: device.upload(np.zeros(1), label="x"),
        lambda: device.upload(np.zeros(1), label="x", borrow=True),
    ):
        with pytest.raises(UseAfterClose, match="the device was closed"):
            use()
    with pytest.raises(UseAfterClose), device.guard("a decode step"):
        pass


def test_a_lent_view_keeps_its_bytes_counted(device):
    buffer = device.allocate((16,), torch.float32, label="x")
    view = buffer.tensor[4:8]
    buffer.close()
    assert device.held() == ()
    assert device.held_bytes == 64
    del view
    assert device.held_bytes == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (61, 4), (0, 65), (2**63, 1), (64, 1)])
def test_copies_out_of_range(device, offset, nbytes):
    buffer = device.upload(np.arange(16, dtype=np.float32), label="x")
    before = device.download(buffer)
    with pytest.raises(CopyOutOfRange, match=rf"bytes {offset} to {offset + nbytes} of buffer 'x': it has 64 bytes"):
        device.copy_in(buffer, np.zeros(nbytes, dtype=np.uint8), offset_bytes=offset)
    with pytest.raises(CopyOutOfRange):
        device.download_bytes(buffer, offset, nbytes)
    assert torch.equal(device.download(buffer), before)


def test_partial_copies(device):
    buffer = device.upload(np.zeros(8, dtype=np.uint8), label="x")
    device.copy_in(buffer, np.array([7, 9], dtype=np.uint8), offset_bytes=3)
    assert device.download(buffer).tolist() == [0, 0, 0, 7, 9, 0, 0, 0]
    assert device.download_bytes(buffer, 3, 3).tolist() == [7, 9, 0]
    device.copy_in(buffer, np.zeros(0, dtype=np.uint8), offset_bytes=8)
    with pytest.raises(CopyOutOfRange):
        device.download_bytes(buffer, 0, -1)


def test_the_memory_limit_holds_for_every_kind_of_allocation():
    with open_device(DEVICE, memory_limit=1000) as device:
        first = device.allocate((600,), torch.uint8, label="first")
        assert device.held_bytes == 600
        for make in (
            lambda: device.allocate((401,), torch.uint8, label="second"),
            lambda: device.upload(np.zeros(401, dtype=np.uint8), label="second"),
            lambda: device.upload(np.zeros(401, dtype=np.uint8), label="second", borrow=True),
        ):
            with pytest.raises(DeviceOutOfMemory) as caught:
                make()
            error = caught.value
            assert (error.asked, error.held, error.limit) == (401, 600, 1000)
            assert error.total == device.total_bytes
            assert "allocating 'second': asked 401 bytes, " in str(error)
            assert "within the memory limit of 1000 bytes. Raise memory_limit" in str(error)
        device.allocate((400,), torch.uint8, label="fits")
        first.close()
        assert device.held_bytes == 400


def test_more_than_the_device_has_is_refused_with_numbers(device):
    free = device.free_bytes
    assert 0 < free <= device.total_bytes
    with pytest.raises(
        DeviceOutOfMemory, match=r"'huge': asked .* GiB, .* GiB free of .* GiB.*smaller context"
    ) as caught:
        device.allocate((device.total_bytes * 2,), torch.uint8, label="huge")
    assert caught.value.asked == 2 * caught.value.total
    with pytest.raises(DeviceOutOfMemory):
        device.allocate((2**62,), torch.float32, label="absurd")
    assert device.held_bytes == 0


def test_bad_arguments(device):
    with pytest.raises(DeviceError, match="sizes are not negative"):
        device.allocate((4, -1), torch.uint8, label="x")
    for limit in (0, -5, 2.0**30, float("nan"), "8GiB", True):
        with pytest.raises(DeviceError, match=f"memory_limit {limit!r}: a limit is a positive whole number"):
            open_device("cpu", memory_limit=limit)


@pytest.mark.parametrize("spec", ["metal", "cuda:x", "cuda:", "cuda:-1", "cpu:0", "", "CUDA"])
def test_unknown_names_are_refused(spec):
    with pytest.raises(DeviceUnavailable, match=r"devices are 'auto', 'cpu', 'cuda', 'cuda:N'"):
        open_device(spec)


def test_devices_that_are_not_there():
    with pytest.raises(DeviceUnavailable):
        open_device("cuda:99")
    if torch.version.cuda is None and torch.version.hip is None:
        for spec in ("cuda", "hip", "hip:0"):
            with pytest.raises(DeviceUnavailable, match=r"built for the CPU only.*use device='cpu'"):
                open_device(spec)


def test_auto_takes_a_gpu_where_there_is_one():
    with open_device() as device:
        assert device.torch_device.type == DEVICE.type
        assert device.name
        assert device.kind in ("cpu", "cuda", "hip")
