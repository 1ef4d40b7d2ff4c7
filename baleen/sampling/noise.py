"""Random numbers as a pure function of (seed, position, token id): no generator, no state that a batch could disturb.

SplitMix64 (Steele, Lea, Flood 2014) in counter form, `output_i = mix(state + (i + 1) * GAMMA)`, three deep: a seed
gives a stream, output number `position` of the stream is the key of a row, output number `token id` of the key is the
random number. `mix` is a bijection of 64 bits and GAMMA is odd, so two seeds never share a stream, two positions of a
seed never share a key, two tokens of a row never share a number; keys of different seeds meet with probability 2^-64.
The generator passes BigCrush. It is integer arithmetic modulo 2^64 (int64 tensors wrap), so every device gives the
same bits. One logarithm follows, where devices may differ in the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """`value` modulo 2^64 as the int64 with the same bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, shift: int) -> Tensor:
    # >> of int64 copies the sign bit; the mask makes it the unsigned shift.
    return x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1))


def _mix_(x: Tensor) -> Tensor:
    _xor_shift_(x, 30).mul_(_MULTIPLIER_1)
    _xor_shift_(x, 27).mul_(_MULTIPLIER_2)
    return _xor_shift_(x, 31)


def random_bits(keys: Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each (key, counter).

    keys, counters  int64, broadcast against each other; counters >= 0
    returns         int64 of the broadcast shape, uniform over all 2^64 values
    """
    # counter + 1, since mix(0) = 0: key 0 would give 0 to counter 0.
    return _mix_(counters * _GAMMA + (keys + _GAMMA))


def stream_of(seed: int) -> int:
    """The stream of a request: an int64, from any int (taken modulo 2^64)."""
    return int(random_bits(torch.tensor(_signed(seed)), torch.tensor(0)))


def row_keys(streams: Tensor, positions: Tensor) -> Tensor:
    """The keys of rows. streams [R] int64 (`stream_of`), positions [R] int64 -> [R] int64."""
    return random_bits(streams, positions)


def exponential(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Exponentially distributed numbers of mean 1, one for each (row, token).

    keys       [R] int64 (`row_keys`)
    token_ids  [R, W] or [1, W] int64
    returns    [R, W] float32 in [2^-63, 24 ln 2]; fine-grained towards 0, the end that decides a race
    """
    bits = random_bits(keys[:, None], token_ids).bitwise_and_(2**63 - 1)
    uniform = bits.to(torch.float32).mul_(2.0**-63).clamp_(2.0**-63, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()
