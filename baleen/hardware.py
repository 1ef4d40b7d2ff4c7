"""The machine, as far as choices depend on it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the choices depend on. device: "cpu", or "cuda" if a GPU is present; memory_bytes: available now."""

    device: str
    memory_bytes: int
    num_cpus: int

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
        device = "cuda" if Path("/dev/nvidia0").exists() else "cpu"
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Hardware(device, memory, cpus)
