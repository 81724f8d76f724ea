"""Fixtures of the tests of the device boundary."""

import pytest

from limits import SMALL_CHUNK
from rooflama.loaders.device import open_device
from rooflama.loaders.device import raw as device_raw
from rooflama.testing.strategies import DEVICE


@pytest.fixture
def device():
    with open_device(DEVICE) as opened:
        yield opened


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(device_raw, "CHUNK_BYTES", SMALL_CHUNK)
