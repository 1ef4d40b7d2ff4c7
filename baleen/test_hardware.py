from __future__ import annotations

import ctypes
from typing import Any

import pytest

from baleen.hardware import Hardware


class Driver:
    """A GPU as its driver tells of it: every call succeeds and writes what it is asked for."""

    def __init__(self, names: dict[str, Any], size: int, major: int, minor: int) -> None:
        self.calls = names
        self.size, self.major, self.minor = size, major, minor

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls[name](self, *[getattr(arg, "_obj", arg) for arg in args])


def put(target: Any, value: int) -> int:
    target.value = value
    return 0


CUDA = {
    "cuInit": lambda driver, flags: 0,
    "cuDeviceGet": lambda driver, device, index: put(device, index),
    "cuDeviceTotalMem_v2": lambda driver, size, device: put(size, driver.size),
    "cuDeviceGetAttribute": lambda driver, out, which, device: put(out, driver.major if which == 75 else driver.minor),
}
HIP = {
    "hipInit": lambda driver, flags: 0,
    "hipDeviceGet": lambda driver, device, index: put(device, index),
    "hipDeviceTotalMem": lambda driver, size, device: put(size, driver.size),
    "hipDeviceComputeCapability": lambda driver, major, minor, device: (
        put(major, driver.major) or put(minor, driver.minor)
    ),
}


@pytest.mark.parametrize(
    ("drivers", "found"),
    [
        ({}, ("cpu", 0, 0, False)),
        ({"libcuda.so.1": Driver(CUDA, 140 << 30, 9, 0)}, ("cuda", 140 << 30, 90, False)),
        ({"libamdhip64.so": Driver(HIP, 190 << 30, 9, 4)}, ("cuda", 190 << 30, 94, True)),
        ({"libcuda.so.1": Driver(CUDA, 1, 8, 6), "libamdhip64.so": Driver(HIP, 2, 9, 4)}, ("cuda", 1, 86, False)),
    ],
    ids=["none", "NVIDIA", "AMD", "both"],
)
def test_the_gpu_is_the_one_that_a_driver_shows(
    monkeypatch: pytest.MonkeyPatch, drivers: dict[str, Driver], found: tuple[str, int, int, bool]
) -> None:
    def load(name: str) -> Driver:
        if name not in drivers:
            raise OSError(name)
        return drivers[name]

    monkeypatch.setattr(ctypes, "CDLL", load)
    hardware = Hardware.detect()
    assert (hardware.device, hardware.gpu_bytes, hardware.capability, hardware.is_amd) == found
