"""A mark in Triton's cache folder: all that a set of settings compiles is on disk. It goes when the cache goes."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
PACKAGES = (
    "torch", "triton", "sgl-deep-gemm", "deep-gemm", "sgl-flash-mla", "flash-mla", "tilelang", "flashinfer-python",
)  # fmt: skip


def mark_of(settings: str) -> Path:
    """Where the mark of these settings lies, or would; another machine, version or source of a kernel has another.

    settings  what else decides which kernels there are
    Raises:   ModuleNotFoundError without Triton.
    """
    import triton

    return Path(triton.knobs.cache.dir) / f"baleen-compiled-{fingerprint(settings)}"


def fingerprint(settings: str) -> str:
    """32 hexadecimal digits of settings, GPU, versions and the files of this folder."""
    digest = hashlib.sha256(f"{settings}\n{_gpu()}\n{[_version(name) for name in PACKAGES]}".encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".json"):
            digest.update(f"\n{path.relative_to(SOURCES)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name} {gpu.major}.{gpu.minor} {gpu.multi_processor_count}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
