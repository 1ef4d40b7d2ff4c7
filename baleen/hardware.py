"""The machine, as far as choices depend on it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("deep_gemm", "flash_mla", "flash_attn_interface", "tilelang", "flashinfer", "aiter", "triton")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the choices depend on.

    device        "cpu", or "cuda" if a GPU is present
    memory_bytes  of the host, available now
    gpu_bytes     of the first GPU, all of it
    capability    of the first GPU: 90 is Hopper; of an AMD GPU 10 times its architecture, 94 for gfx942
    libraries     modules with kernels for it that can be imported
    is_amd        the GPU is AMD's, which torch calls cuda too
    """

    device: str
    memory_bytes: int
    num_cpus: int
    gpu_bytes: int = 0
    capability: int = 0
    libraries: frozenset[str] = frozenset()
    is_amd: bool = False

    @staticmethod
    def detect() -> Hardware:
        """This machine, within the limits of its container."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        meminfo = Path("/proc/meminfo")
        if meminfo.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
            memory = int(match[1]) * 1024
        group = Path("/sys/fs/cgroup")
        if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
            # Cached files count as used, but give way.
            cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            used = int((group / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
            memory = max(0, min(memory, int(limit) - used))
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        nvidia = _first_gpu()
        gpu = nvidia or _first_amd_gpu()
        if gpu is None:
            return Hardware("cpu", memory, cpus)
        libraries = frozenset(name for name in LIBRARIES if importlib.util.find_spec(name))
        return Hardware("cuda", memory, cpus, *gpu, libraries, is_amd=nvidia is None)


def _first_gpu() -> tuple[int, int] | None:
    """(bytes, capability) of the first NVIDIA GPU that CUDA shows to this process, asked of the driver; or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, size, major, minor = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    return None if failed else (size.value, 10 * major.value + minor.value)


def _first_amd_gpu() -> tuple[int, int] | None:
    """The same of the first AMD GPU, asked of the HIP runtime."""
    try:
        hip = ctypes.CDLL("libamdhip64.so")
    except OSError:
        return None
    device, size, major, minor = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    failed = (
        hip.hipInit(0)
        or hip.hipDeviceGet(ctypes.byref(device), 0)
        or hip.hipDeviceTotalMem(ctypes.byref(size), device)
        or hip.hipDeviceComputeCapability(ctypes.byref(major), ctypes.byref(minor), device)
    )
    return None if failed else (size.value, 10 * major.value + minor.value)
