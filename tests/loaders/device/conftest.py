"""Fixtures of the tests of the device boundary."""

import pytest

from rooflama.loaders.device import open_device
from rooflama.loaders.device import raw as device_raw
from strategies import DEVICE, SMALL_CHUNK


@pytest.fixture
def device():
    with open_device(DEVICE) as opened:
        yield opened


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(device_raw, "CHUNK_BYTES", SMALL_CHUNK)
