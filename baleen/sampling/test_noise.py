"""The random numbers: against published SplitMix64 outputs, and statistically at fixed seeds (so never by chance)."""

from __future__ import annotations

import math

import pytest
import torch

from baleen.sampling import noise

# Chi-square of df degrees of freedom stays below this but for 1 run in 100,000 (Wilson-Hilferty).
CHANCE_SIGMAS = 4.265


def chi_square_limit(df: int) -> float:
    return df * (1 - 2 / (9 * df) + CHANCE_SIGMAS * math.sqrt(2 / (9 * df))) ** 3


def chi_square(counts: torch.Tensor, expected: float) -> float:
    return float(((counts.double() - expected) ** 2 / expected).sum())


def keys_of(seeds: list[int], positions: list[int]) -> torch.Tensor:
    """[len(seeds) * len(positions)] row keys, seed by seed."""
    streams = torch.tensor([noise.stream_of(seed) for seed in seeds])
    return noise.row_keys(streams[:, None], torch.tensor(positions)).flatten()


def test_published_splitmix64_outputs() -> None:
    """The first outputs of SplitMix64 from seed 1234567, as listed by Rosetta Code and others."""
    bits = noise.random_bits(torch.tensor(1234567), torch.arange(5))
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [value % 2**64 for value in bits.tolist()] == published


def test_seed_is_taken_modulo_2_to_the_64() -> None:
    assert noise.stream_of(-1) == noise.stream_of(2**64 - 1)
    assert len({noise.stream_of(seed) for seed in (0, 1, -1, 2**32, 2**63 - 1, -(2**63))}) == 6


@pytest.mark.parametrize("low_bit", [0, 20, 40, 58])
def test_bits_are_uniform(low_bit: int) -> None:
    """Six bits at several places of the number, over seeds, positions and tokens that count up."""
    keys = keys_of(list(range(8)), list(range(32)))
    bits = noise.random_bits(keys[:, None], torch.arange(1000)[None])
    counts = ((bits >> low_bit) & 63).flatten().bincount(minlength=64)
    assert chi_square(counts, bits.numel() / 64) < chi_square_limit(63)


def test_exponential_has_the_exponential_distribution() -> None:
    numbers = noise.exponential(keys_of([5], list(range(200))), torch.arange(1000)[None]).flatten()
    # Equal slices of the distribution function 1 - exp(-x).
    slices = (-torch.expm1(-numbers.double()) * 100).long()
    assert chi_square(slices.bincount(minlength=100), numbers.numel() / 100) < chi_square_limit(99)
    assert 0 < float(numbers.min()) < 1e-4
    assert float(numbers.max()) < 17


def test_small_numbers_are_fine_grained() -> None:
    """A race of many tokens is decided near 0: on a grid of 2^-24 a token of probability 1e-9 would never win."""
    numbers = noise.exponential(keys_of([1], list(range(400))), torch.arange(5000)[None]).flatten()
    smallest = numbers[numbers < 2e-5]
    assert len(smallest) == pytest.approx(2e6 * 2e-5, rel=0.7)
    assert len(smallest.unique()) == len(smallest)
    assert not torch.equal((smallest * 2**24).round() / 2**24, smallest)


@pytest.mark.parametrize(
    ("first", "second"),
    [(([7], [100]), ([7], [101])), (([7], [100]), ([8], [100])), (([0], [0]), ([0], [1])), (([0], [1]), ([1], [0]))],
    ids=["next position", "next seed", "first positions", "seed and position swapped"],
)
def test_neighbours_are_independent(first: tuple[list[int], list[int]], second: tuple[list[int], list[int]]) -> None:
    """16 x 16 contingency table of the numbers of one row against those of another, token by token."""
    tokens = torch.arange(100_000)[None]
    one, other = (-torch.expm1(-noise.exponential(keys_of(*row), tokens)) * 16 for row in (first, second))
    counts = (one.long().clamp(max=15) * 16 + other.long().clamp(max=15)).flatten().bincount(minlength=256)
    assert chi_square(counts, tokens.numel() / 256) < chi_square_limit(255)


def test_adjacent_tokens_are_independent() -> None:
    numbers = -torch.expm1(-noise.exponential(keys_of([3], [17]), torch.arange(200_000)[None]))[0] * 16
    pairs = numbers.long().clamp(max=15).view(-1, 2)
    counts = (pairs[:, 0] * 16 + pairs[:, 1]).bincount(minlength=256)
    assert chi_square(counts, len(pairs) / 256) < chi_square_limit(255)


def test_a_number_does_not_depend_on_its_place_in_the_tensor() -> None:
    keys = keys_of([1, 2, 3], [10, 11])
    whole = noise.exponential(keys, torch.arange(1003)[None])
    for start, end in ((0, 1), (3, 20), (5, 1003)):
        tokens = torch.arange(start, end)[None]
        assert torch.equal(noise.exponential(keys[2:3], tokens), whole[2:3, start:end])
