"""The two halves of pdl.begin for kernels in Gluon, whose groups of warps call them apart: each group waits."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait(PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until all kernels before have ended and their writes are seen."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def let_next_start(PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    """The next kernel may start up."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
