"""The inputs of MLA in Triton, one launch each.

Rotated halves and the Hadamard transform meet in parts of Dr/2 dims, four to an index vector: rope_half turns part 0
against part 1, and the matrix of 4n is that of n inside butterflies of four. A head is [part 0 | part 1 | part 2 | 3].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baleen.kernels import pdl
from baleen.kernels.fp8_quant.triton_kernel import quantize_blocks
from baleen.kernels.mla_inputs import reference

_NUM_PROGRAMS = 264  # two for each multiprocessor
_KEYS = tl.constexpr(16)  # index keys of a program: the rows of a tl.dot
_KEYS_FEW = {"TOKENS": 1, "num_warps": 4}
_KEYS_MANY = {"TOKENS": 4, "num_warps": 4}
_QUERIES = {"HEADS": 64, "num_warps": 4}
_ROPE = {"HEADS": 64, "num_warps": 4}
_FEW_HEADS = 16  # of a program where tokens are few


def store_keys(
    latent: Tensor,
    k_pe: Tensor,
    index_k: Tensor,
    latent_weight: Tensor,
    latent_eps: float,
    key_weight: Tensor,
    key_bias: Tensor,
    key_eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    latent_cache: tuple[Tensor, ...],
    index_cache: tuple[Tensor, ...],
) -> None:
    dim, rope_dim = latent.shape[1], k_pe.shape[1]
    if not _keys_fit(latent, k_pe, index_k, latent_cache, index_cache):
        norms = latent_weight, latent_eps, key_weight, key_bias, key_eps
        reference.store_keys(latent, k_pe, index_k, *norms, cos, sin, slots, latent_cache, index_cache)
        return
    # The float layouts are the FP8 ones with the rope part in the same row, pages of one key and no scales.
    rows, keys = latent_cache[0], index_cache[0]
    latent_fp8, index_fp8 = len(latent_cache) == 3, len(index_cache) == 2
    scales, rope = latent_cache[1:] if latent_fp8 else (rows, rows[:, dim:])
    key_scales = index_cache[1] if index_fp8 else keys
    num_tokens = latent.shape[0]
    if not num_tokens:
        return
    tile = _KEYS_FEW if num_tokens <= _NUM_PROGRAMS else _KEYS_MANY
    index_programs = triton.cdiv(num_tokens, _KEYS.value)
    _store_keys[(index_programs + triton.cdiv(num_tokens, tile["TOKENS"]),)](
        latent,
        k_pe,
        index_k,
        latent_weight,
        key_weight,
        key_bias,
        cos.contiguous(),
        sin.contiguous(),
        slots.contiguous(),
        rows,
        scales,
        rope,
        keys,
        key_scales,
        num_tokens,
        index_programs,
        latent_eps,
        key_eps,
        LATENT_STRIDE=latent.stride(0),
        K_PE_STRIDE=k_pe.stride(0),
        INDEX_STRIDE=index_k.stride(0),
        ROWS_STRIDE=rows.stride(0),
        SCALES_STRIDE=scales.stride(0),
        ROPE_STRIDE=rope.stride(0),
        PAGE_STRIDE=keys.stride(0),
        PAGE_SCALES_STRIDE=key_scales.stride(0),
        PAGE=keys.shape[1] if index_fp8 else 1,
        DIM=dim,
        PART=rope_dim // 2,
        **tile,
        **pdl.launch(latent),
    )


def index_queries(q: Tensor, gates: Tensor, gate_scale: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, dim = q.shape
    part = cos.shape[1]
    powers = num_heads >= _FEW_HEADS and not num_heads & (num_heads - 1)
    if not _runs(q) or q.dtype != torch.bfloat16 or not powers or dim != 128 or part != 32 or q.stride(2) != 1:
        return reference.index_queries(q, gates, gate_scale, cos, sin)
    values = torch.empty(num_tokens, num_heads, dim, dtype=torch.float8_e4m3fn, device=q.device)
    weights = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    if num_tokens:
        heads = min(_heads(num_tokens, num_heads, _QUERIES["HEADS"]), num_heads)
        _index_queries[(num_tokens, num_heads // heads)](
            q,
            gates,
            cos.contiguous(),
            sin.contiguous(),
            values,
            weights,
            gate_scale,
            q.stride(0),
            q.stride(1),
            gates.stride(0),
            gates.stride(1),
            NUM_HEADS=num_heads,
            HEADS=heads,
            PART=part,
            num_warps=_QUERIES["num_warps"],
            **pdl.launch(q),
        )
    return values, weights


def rope_queries(q: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    num_tokens, num_heads, dim = q.shape
    if not _runs(q) or dim & (dim - 1) or dim < 16 or q.stride(2) != 1 or out.stride(2) != 1:
        reference.rope_queries(q, cos, sin, out)
        return
    if q.numel():
        heads = _heads(num_tokens, num_heads, _ROPE["HEADS"])
        _rope_queries[(num_tokens, triton.cdiv(num_heads, heads))](
            q,
            cos.contiguous(),
            sin.contiguous(),
            out,
            q.stride(0),
            q.stride(1),
            out.stride(0),
            out.stride(1),
            NUM_HEADS=num_heads,
            HEADS=heads,
            PART=dim // 2,
            # No thread without elements of its own: it could read what another has turned already.
            num_warps=min(_ROPE["num_warps"], heads * dim // 256),
            **pdl.launch(q),
        )


def _runs(x: Tensor) -> bool:
    return (x.is_cuda or bool(triton.knobs.runtime.interpret)) and x.dtype in (torch.bfloat16, torch.float32)


def _keys_fit(
    latent: Tensor, k_pe: Tensor, index_k: Tensor, latent_cache: tuple[Tensor, ...], index_cache: tuple[Tensor, ...]
) -> bool:
    dim, rope_dim, key_dim = latent.shape[1], k_pe.shape[1], index_k.shape[1]
    if not _runs(latent) or any(x.stride(-1) != 1 for x in (latent, k_pe, index_k, *latent_cache, *index_cache)):
        return False
    if len(latent_cache) == 3 and dim % 128:
        return False
    if len(index_cache) == 2 and (key_dim != 128 or index_cache[0].stride(1) != key_dim):
        return False
    powers = not dim & (dim - 1) and not rope_dim & (rope_dim - 1)
    return powers and dim >= 16 and rope_dim >= 16 and key_dim == 2 * rope_dim


def _heads(num_tokens: int, num_heads: int, most: int) -> int:
    return _FEW_HEADS if num_tokens * num_heads < _NUM_PROGRAMS * most else most


# Strides of the caches are constants so that the compiler knows how rows are aligned: 656 bytes are 41 times 16.
@triton.jit(do_not_specialize=["num_tokens", "index_programs"])
def _store_keys(  # type: ignore[no-untyped-def]
    latent,
    k_pe,
    index_k,
    latent_weight,
    key_weight,
    key_bias,
    cos,
    sin,
    slots,
    rows,
    scales,
    rope,
    keys,
    key_scales,
    num_tokens,
    index_programs,
    latent_eps,
    key_eps,
    LATENT_STRIDE: tl.constexpr,
    K_PE_STRIDE: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    ROWS_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    PAGE_SCALES_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs: the index keys of _KEYS tokens each. The others: the latent rows of TOKENS."""
    program = tl.program_id(0)
    if program < index_programs:
        _store_index(
            index_k,
            key_weight,
            key_bias,
            key_eps,
            cos,
            sin,
            slots,
            keys,
            key_scales,
            program * _KEYS,
            num_tokens,
            INDEX_STRIDE,
            PAGE_STRIDE,
            PAGE_SCALES_STRIDE,
            PAGE,
            PART,
            PDL,
        )
    else:
        _store_latent(
            latent,
            k_pe,
            latent_weight,
            latent_eps,
            cos,
            sin,
            slots,
            rows,
            scales,
            rope,
            (program - index_programs) * TOKENS,
            num_tokens,
            LATENT_STRIDE,
            K_PE_STRIDE,
            ROWS_STRIDE,
            SCALES_STRIDE,
            ROPE_STRIDE,
            DIM,
            PART,
            TOKENS,
            PDL,
        )


@triton.jit
def _store_index(  # type: ignore[no-untyped-def]
    index_k,
    weight,
    bias,
    eps,
    cos,
    sin,
    slots,
    keys,
    scales,
    begin,
    num_tokens,
    INDEX_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    every_row = tl.zeros((1, 1), tl.int32)
    gains, biases = _load_parts(weight + every_row, PART), _load_parts(bias + every_row, PART)
    pdl.begin(PDL)
    token, slot, inside = _tokens(slots, begin, num_tokens, _KEYS)
    c, s = _angles(cos, sin, token, PART)
    p0, p1, p2, p3 = _normed_key(_load_parts(index_k + token[:, None] * INDEX_STRIDE, PART), gains, biases, eps, PART)
    p0, p1 = _turn_halves(p0, p1, c, s)
    page, offset = slot // PAGE, slot % PAGE
    target = keys + (page * PAGE_STRIDE + offset * (4 * PART))[:, None] + tl.arange(0, 4 * PART)[None, :]
    if keys.dtype.element_ty == tl.float8e4nv:
        quantized, scale = _quantize_transform(p0, p1, p2, p3, _KEYS, PART)
        tl.store(target, quantized, mask=inside[:, None])
        tl.store(scales + page * SCALES_STRIDE + offset, scale, mask=inside)
    else:
        joined = _join_parts(p0, p1, p2, p3, _KEYS, PART)
        tl.store(target, joined.to(keys.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _store_latent(  # type: ignore[no-untyped-def]
    latent,
    k_pe,
    weight,
    eps,
    cos,
    sin,
    slots,
    rows,
    scales,
    rope,
    begin,
    num_tokens,
    LATENT_STRIDE: tl.constexpr,
    K_PE_STRIDE: tl.constexpr,
    ROWS_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    dims, pairs = tl.arange(0, DIM), tl.arange(0, 2 * PART)[None, :]
    gain = tl.load(weight + dims)
    pdl.begin(PDL)
    token, slot, inside = _tokens(slots, begin, num_tokens, TOKENS)
    # All loads before the first store, which they could not pass.
    x = tl.load(latent + token[:, None] * LATENT_STRIDE + dims[None, :])
    pe = tl.load(k_pe + token[:, None] * K_PE_STRIDE + pairs)
    c, s = _angles(cos, sin, token, PART)
    pe = _turn_pairs(pe, c, s, TOKENS, PART).to(rope.dtype.element_ty)
    tl.store(rope + slot[:, None] * ROPE_STRIDE + pairs, pe, mask=inside[:, None])
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + eps)
    normed = (wide * inverse[:, None] * gain.to(tl.float32)[None, :]).to(x.dtype)
    target = rows + slot[:, None] * ROWS_STRIDE + dims[None, :]
    if rows.dtype.element_ty == tl.float8e4nv:
        quantized, scale = quantize_blocks(tl.reshape(normed.to(tl.float32), (TOKENS * DIM // 128, 128)))
        tl.store(target, tl.reshape(quantized, (TOKENS, DIM)), mask=inside[:, None])
        blocks = slot[:, None] * SCALES_STRIDE + tl.arange(0, DIM // 128)[None, :]
        tl.store(scales + blocks, tl.reshape(scale, (TOKENS, DIM // 128)), mask=inside[:, None])
    else:
        tl.store(target, normed.to(rows.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _tokens(slots, first, num_tokens, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """ROWS tokens from `first` on, their slots, and which there are: the last stands for those past the end."""
    token = first + tl.arange(0, ROWS)
    existing = tl.minimum(token, num_tokens - 1).to(tl.int64)
    return existing, tl.load(slots + existing), token < num_tokens


@triton.jit
def _angles(cos, sin, token, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    turns = token[:, None] * PART + tl.arange(0, PART)[None, :]
    return tl.load(cos + turns), tl.load(sin + turns)


@triton.jit
def _index_queries(  # type: ignore[no-untyped-def]
    q,
    gates,
    cos,
    sin,
    values,
    weights,
    gate_scale,
    token_stride,
    head_stride,
    gates_token_stride,
    gates_head_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS heads of one token."""
    pdl.begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads, part, dims = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PART), tl.arange(0, 4 * PART)
    source = q + token * token_stride + heads[:, None] * head_stride + part[None, :]
    first, second = tl.load(source), tl.load(source + PART)
    third, fourth = tl.load(source + 2 * PART), tl.load(source + 3 * PART)
    gate = tl.load(gates + token * gates_token_stride + heads * gates_head_stride).to(tl.float32)
    c, s = tl.load(cos + token * PART + part)[None, :], tl.load(sin + token * PART + part)[None, :]
    first, second = _turn_halves(first, second, c, s)
    quantized, scale = _quantize_transform(first, second, third, fourth, HEADS, PART)
    row = token * NUM_HEADS + heads
    tl.store(values + row[:, None] * (4 * PART) + dims[None, :], quantized)
    tl.store(weights + row, gate * gate_scale * scale)


@triton.jit
def _rope_queries(  # type: ignore[no-untyped-def]
    q,
    cos,
    sin,
    out,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS heads of one token."""
    pdl.begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads, part = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, PART)
    dims, inside = tl.arange(0, 2 * PART)[None, :], heads < NUM_HEADS
    x = tl.load(q + token * q_token_stride + heads * q_head_stride + dims, mask=inside, other=0.0)
    c, s = tl.load(cos + token * PART + part)[None, :], tl.load(sin + token * PART + part)[None, :]
    turned = _turn_pairs(x, c, s, HEADS, PART)
    tl.store(out + token * out_token_stride + heads * out_head_stride + dims, turned, mask=inside)


@triton.jit
def _turn_pairs(x, c, s, ROWS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """rope_interleaved of x [ROWS, 2 * PART]."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, PART, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * PART)).to(x.dtype)


@triton.jit
def _turn_halves(first, second, c, s):  # type: ignore[no-untyped-def]
    """rope_half of the two halves, each [ROWS, PART]."""
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * c - y * s).to(first.dtype), (y * c + x * s).to(first.dtype)


@triton.jit
def _normed_key(parts, gains, biases, eps, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """LayerNorm of four parts [ROWS, PART] of rows, in their dtype; gains and biases are parts of one row."""
    dtype: tl.constexpr = parts[0].dtype
    p0, p1, p2, p3 = _widened(parts)
    w0, w1, w2, w3 = _widened(gains)
    b0, b1, b2, b3 = _widened(biases)
    mean = (tl.sum(p0 + p1 + p2 + p3, axis=1) / (4 * PART))[:, None]
    p0, p1, p2, p3 = p0 - mean, p1 - mean, p2 - mean, p3 - mean
    variance = tl.sum(p0 * p0 + p1 * p1 + p2 * p2 + p3 * p3, axis=1) / (4 * PART)
    inverse = tl.rsqrt(variance + eps)[:, None]
    p0, p1 = p0 * inverse * w0 + b0, p1 * inverse * w1 + b1
    p2, p3 = p2 * inverse * w2 + b2, p3 * inverse * w3 + b3
    return p0.to(dtype), p1.to(dtype), p2.to(dtype), p3.to(dtype)


@triton.jit
def _load_parts(rows, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four parts [ROWS, PART] of the rows [ROWS, 1] of pointers."""
    rows += tl.arange(0, PART)[None, :]
    return tl.load(rows), tl.load(rows + PART), tl.load(rows + 2 * PART), tl.load(rows + 3 * PART)


@triton.jit
def _widened(parts):  # type: ignore[no-untyped-def]
    return parts[0].to(tl.float32), parts[1].to(tl.float32), parts[2].to(tl.float32), parts[3].to(tl.float32)


@triton.jit
def _signs(N: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [N, N], N at most 256: (-1)^popcount(i & j), the Sylvester matrix before its scale."""
    index = tl.arange(0, N)
    parity = index[:, None] & index[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where((parity & 1) == 1, -1.0, 1.0)


@triton.jit
def _quantize_transform(p0, p1, p2, p3, ROWS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Parts [ROWS, PART] of 128 dims -> e4m3 [ROWS, 128], scale [ROWS] of their orthonormal Hadamard transform."""
    signs = _signs(PART).to(p0.dtype)
    # The products are exact; for float32 they would be of TF32 otherwise.
    q0, q1 = tl.dot(p0, signs, input_precision="ieee"), tl.dot(p1, signs, input_precision="ieee")
    q2, q3 = tl.dot(p2, signs, input_precision="ieee"), tl.dot(p3, signs, input_precision="ieee")
    a, b, c, d = q0 + q1, q0 - q1, q2 + q3, q2 - q3
    spread = _join_parts(a + c, b + d, a - c, b - d, ROWS, PART) * ((4 * PART) ** -0.5)
    return quantize_blocks(spread.to(p0.dtype).to(tl.float32))


@triton.jit
def _join_parts(p0, p1, p2, p3, ROWS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    joined = tl.join(tl.join(p0, p1), tl.join(p2, p3))  # [ROWS, PART, 2, 2], the last of them the upper bit
    return tl.reshape(tl.permute(joined, (0, 3, 2, 1)), (ROWS, 4 * PART))
