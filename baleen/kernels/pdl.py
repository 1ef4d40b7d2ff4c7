"""Programmatic dependent launch: a kernel starts up while the one before it in the stream ends, on Hopper and newer.

Its programs take their places, load their parameters and what no kernel writes, and wait; what they wait for is all
that was launched before. In Triton: the parameter `PDL: tl.constexpr`, `pdl.begin(PDL)` in the kernel and
`**pdl.launch(tensor)` in its launch.

Every program of such a kernel calls `begin`, on each of its paths,
- before it reads what another kernel may have written: whatever was computed in this step, tables and caches too;
- before it writes: memory is used again, so that a kernel before may still be reading what lies there;
- before it returns: a kernel ends when its programs have, and what comes after it waits for that alone. Were this one
  to end before the one that it did not wait for, the next would run beside that.
What comes before `begin` may only read weights. The kernel that wrote them must not be the one just before. Other
libraries' kernels may break the last rule, as FlashMLA's and FlashAttention-3's do that combine the splits of K: what
follows them is launched with early=False.

`begin` also lets the next kernel start up. It does so once all programs of this one are there, and so never takes the
place of one of them, however large the grid. A kernel launched without this waits for the end of all before, as ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ENABLED = True  # False: every kernel waits for the end of the one before. A CUDA graph keeps what it was captured with.


def launch(tensor: Tensor, early: bool = True) -> dict[str, Any]:
    """The keyword arguments that the launch of a kernel with the parameter PDL takes, for its device and Triton's
    interpreter.

    tensor  one that the kernel takes
    early   False: this kernel itself starts when the one before has ended; the next may still start up early
    """
    if ENABLED and tensor.is_cuda and _is_possible(tensor.get_device()):
        return {"PDL": True, "launch_pdl": early}
    return {"PDL": False}


@cache
def _is_possible(device: int) -> bool:
    nvidia = torch.version.hip is None and not triton.knobs.runtime.interpret
    return nvidia and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Waits until all kernels before have ended and their writes are seen, then lets the next kernel start up."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
