"""What the Gluon kernels of sparse MLA share, in any layout: lists of indices, and codes of FP8."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def load_index(chosen, position, end):  # type: ignore[no-untyped-def]
    """int32; -1 from end on."""
    return gl.load(chosen + position, mask=position < end, other=-1).to(gl.int32)


@gluon.jit
def dequantize(words, factor):  # type: ignore[no-untyped-def]
    """e4m3 codes, four to an int32 word, -> bfloat16, two to a word: the first two codes, and the others. factor: in
    both halves of a word a bfloat16, the scale times 2^120. A code's 7 bits, put where bfloat16 has the low bits of its
    exponent and the high ones of its mantissa, are its value / 2^120, subnormal ones too.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 s, t, u;
        shr.b32 t, $2, 4;
        and.b32 s, $2, 0x80808080;
        lop3.b32 t, t, 0x07070707, s, 0xEA;
        and.b32 u, $2, 0x0F0F0F0F;
        shl.b32 u, u, 4;
        prmt.b32 s, u, t, 0x5140;
        prmt.b32 t, u, t, 0x7362;
        mul.rn.bf16x2 $0, s, $3;
        mul.rn.bf16x2 $1, t, $3;
        }""",
        "=r,=r,r,r",
        [words, factor],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
