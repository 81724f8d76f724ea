"""Finding devices, and the memory that they have according to the driver or the operating system."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from .errors import DeviceUnavailable


def find_device(spec: str) -> tuple[torch.device, str]:
    """The torch device and its kind, "cpu", "cuda" or "hip", for "auto", "cpu", "cuda[:n]" or "hip[:n]".

    Without a number it is torch's current device, by default the first.

    Raises:
        DeviceUnavailable: the name is unknown, there is no such device or driver, or torch was built without it.
    """
    built = "hip" if torch.version.hip else "cuda"
    if spec == "auto":
        spec = built if torch.cuda.is_available() else "cpu"
    if spec == "cpu":
        return torch.device("cpu"), "cpu"
    kind, _, number = spec.partition(":")
    if kind not in ("cuda", "hip") or (":" in spec and not (number.isascii() and number.isdigit())):
        rule = "devices are 'auto', 'cpu', 'cuda', 'cuda:N', 'hip' and 'hip:N'"
        raise DeviceUnavailable(f"device {spec!r}", rule=rule, remedy="Name one of them")
    with_torch = f"device {spec!r} with torch {torch.__version__}"
    if torch.version.hip is None and torch.version.cuda is None:
        remedy = "Install a CUDA or ROCm build of torch, or use device='cpu'"
        raise DeviceUnavailable(with_torch, rule="this torch was built for the CPU only", remedy=remedy)
    if kind == "hip" and built == "cuda":
        remedy = "Install a ROCm build of torch, or use device='cuda'"
        raise DeviceUnavailable(with_torch, rule="this torch was built for CUDA", remedy=remedy)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number) if number else torch.cuda.current_device() if count else 0
    if index >= count:
        remedy = "Check the driver with nvidia-smi or rocm-smi, and CUDA_VISIBLE_DEVICES; or use device='cpu'"
        raise DeviceUnavailable(
            f"device {spec!r}, where the driver shows {count} devices",
            rule="devices are numbered from 0",
            remedy=f"Use a number below {count}" if count else remedy,
        )
    return torch.device("cuda", index), built


def device_name(device: torch.device) -> str:
    """The device's name according to the driver, or for a CPU the operating system."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def free_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total memory now. For a CPU: memory available without swapping, within the limit of the cgroup."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        free, total = values["MemAvailable"], values["MemTotal"]
    except (OSError, KeyError):  # not Linux
        page = os.sysconf("SC_PAGE_SIZE")
        total = free = os.sysconf("SC_PHYS_PAGES") * page
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and used is not None:
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return free, total


def _cgroup_bytes(name: str) -> int | None:
    """A number of the container's cgroup (version 2); None if there is no limit or no such file."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
