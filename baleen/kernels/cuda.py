"""CUDA C++ compiled at its first use: NVRTC makes a source file machine code, the driver loads and launches it.

No build step and no headers: NVRTC comes with torch's CUDA packages. Importing this module where there is none, or no
GPU, is a ModuleNotFoundError, as for any library that is missing. Imports torch only.
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
    """Machine code of a .cu file without includes. architecture: as sm_90a.

    Raises:  RuntimeError with the compiler's messages.
    """
    program = ctypes.c_void_p()
    text, name = source.read_bytes(), source.name.encode()
    _check_nvrtc(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
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

    def launch(self, grid: int, block: int, *arguments: Tensor | int) -> None:
        """Runs it on the current stream. Tensors pass as pointers, ints as 8 bytes, of which an int parameter reads
        the lower 4.
        """
        values = [
            ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else ctypes.c_longlong(argument)
            for argument in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        launch = (self._function, grid, 1, 1, block, 1, 1, self._shared_bytes, stream, pointers, None)
        status = _DRIVER.cuLaunchKernel(*launch)
        if status == _INVALID_CONTEXT:  # a thread that has not used the device before
            _use_device(self._device)
            status = _DRIVER.cuLaunchKernel(*launch)
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
    """The kernel called `name` (extern "C") of a .cu file; the first call for a device compiles the file, in a second.

    Call it before a CUDA graph is captured: loading code is not allowed there.
    """
    function = ctypes.c_void_p()
    _check(_DRIVER.cuModuleGetFunction(ctypes.byref(function), _module(source, device), name.encode()))
    return Kernel(function, device, shared_bytes)


if not torch.cuda.is_available():
    raise ModuleNotFoundError("no CUDA device", name="cuda")
_NVRTC = find_nvrtc()
_DRIVER = ctypes.CDLL("libcuda.so.1")
