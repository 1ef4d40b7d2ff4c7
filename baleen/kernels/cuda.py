"""CUDA C++ compiled at its first use: NVRTC makes a source file machine code, the driver loads and launches it.

No build step, and no headers but the .cuh files beside the source: NVRTC comes with torch's CUDA packages. Importing
this module where there is none, or no GPU, is a ModuleNotFoundError, as for any library that is missing. Imports torch
only.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


def find_nvrtc() -> ctypes.CDLL:
    """NVRTC of torch's CUDA version: the one of torch's packages, of an installed toolkit, or on the system's path.

    Raises:  ModuleNotFoundError if there is none.
    """
    name = f"libnvrtc.so.{(torch.version.cuda or '0').split('.')[0]}"
    packages = Path(torch.__file__).parent.parent / "nvidia"
    for library in (*packages.glob(f"*/lib/{name}"), *Path("/usr/local").glob(f"cuda*/lib64/{name}"), Path(name)):
        try:
            # It asks for this one by its bare name, which is found if it is already loaded.
            for builtins in library.parent.glob("libnvrtc-builtins.so.*") if library.is_absolute() else ():
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(library))
        except OSError:
            continue
    raise ModuleNotFoundError(f"{name} is not installed", name="nvrtc")


def compile_source(nvrtc: ctypes.CDLL, source: Path, architecture: str) -> bytes:
    """Machine code of a .cu file, which may include .cuh files of its folder. architecture: as sm_90a.

    Raises:  RuntimeError with the compiler's messages.
    """
    program = ctypes.c_void_p()
    headers = sorted(source.parent.glob("*.cuh"))
    strings = ctypes.c_char_p * len(headers)
    texts = strings(*(header.read_bytes() for header in headers))
    names = strings(*(header.name.encode() for header in headers))
    text, name = source.read_bytes(), source.name.encode()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, len(headers), texts, names)
    _check_nvrtc(nvrtc, status)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    if nvrtc.nvrtcCompileProgram(program, len(options), options):
        log = _read(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{log.decode().rstrip(chr(0))}")
    code = _read(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code


def _read(nvrtc: ctypes.CDLL, get_size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(nvrtc, get_size(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check_nvrtc(nvrtc, get(program, buffer))
    return buffer.raw


def _check_nvrtc(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _check(status: int) -> None:
    if status:
        message = ctypes.c_char_p()
        _DRIVER.cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"CUDA driver: {(message.value or b'unknown error').decode()} ({status})")


class Kernel:
    """A kernel on one device. shared_bytes: its dynamic shared memory."""

    def __init__(self, function: ctypes.c_void_p, device: int, shared_bytes: int) -> None:
        self._function, self._device, self._shared_bytes = function, device, shared_bytes
        _check(_DRIVER.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, shared_bytes))

    def launch(self, grid: int, block: int, *arguments: Tensor | int, early: bool = False) -> None:
        """Runs it on the current stream. Tensors pass as pointers, ints as 8 bytes, of which an int parameter reads
        the lower 4.

        early: it starts up while the kernel before ends, and waits for that itself, as `pdl` says
        """
        values = [
            ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else ctypes.c_longlong(argument)
            for argument in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, int(early))
        launch = _Launch((grid, 1, 1), (block, 1, 1), self._shared_bytes, stream, ctypes.pointer(attribute), 1)
        status = _DRIVER.cuLaunchKernelEx(ctypes.byref(launch), self._function, pointers, None)
        if status == _INVALID_CONTEXT:  # a thread that has not used the device before
            _use_device(self._device)
            status = _DRIVER.cuLaunchKernelEx(ctypes.byref(launch), self._function, pointers, None)
        _check(status)


def _use_device(device: int) -> None:
    """Makes the device's context, which torch made, the one of this thread."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_DRIVER.cuDeviceGet(ctypes.byref(handle), device))
    _check(_DRIVER.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    _check(_DRIVER.cuCtxSetCurrent(context))


@cache
def _module(source: Path, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    code = compile_source(_NVRTC, source, f"sm_{major}{minor}" + ("a" if major >= 9 else ""))
    module = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        _use_device(device)
        _check(_DRIVER.cuModuleLoadData(ctypes.byref(module), code))
    return module


@cache
def kernel(source: Path, name: str, device: int, shared_bytes: int) -> Kernel:
    """The kernel called `name` (extern "C") of a .cu file; the first call for a device compiles the file, in seconds.

    Call it before a CUDA graph is captured: loading code is not allowed there.
    """
    function = ctypes.c_void_p()
    _check(_DRIVER.cuModuleGetFunction(ctypes.byref(function), _module(source, device), name.encode()))
    return Kernel(function, device, shared_bytes)


if not torch.cuda.is_available():
    raise ModuleNotFoundError("no CUDA device", name="cuda")
_NVRTC = find_nvrtc()
_DRIVER = ctypes.CDLL("libcuda.so.1")
