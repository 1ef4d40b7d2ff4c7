from __future__ import annotations

from array import array

import pytest

from baleen.messages import SamplingParams
from baleen.scheduler.admission import NewTokenRatio, expected_pages
from baleen.scheduler.request import Request


def make(num_prompt: int, max_new_tokens: int, num_output: int = 0, num_pending: int = 0) -> Request:
    return Request(
        rid="a",
        sampling=SamplingParams(),
        token_ids=array("i", range(num_prompt + num_output)),
        num_prompt=num_prompt,
        max_tokens=num_prompt + max_new_tokens,
        stop_ids=frozenset(),
        page_size=64,
        num_pending=num_pending,
    )


def test_ratio_falls_to_a_seventh_in_600_steps() -> None:
    ratio = NewTokenRatio(1.0)
    assert ratio.value == 0.7
    for _ in range(300):
        ratio.decay()
    assert ratio.value == pytest.approx((0.7 + 0.098) / 2)
    for _ in range(400):
        ratio.decay()
    assert ratio.value == pytest.approx(0.098)
    ratio.reset()
    assert ratio.value == 0.7


def test_ratio_scales_with_conservativeness_up_to_1() -> None:
    assert NewTokenRatio(0.3).value == pytest.approx(0.21)
    assert NewTokenRatio(2.0).value == 1.0


def test_ratio_after_a_retraction_is_what_was_generated_and_20_more_each() -> None:
    ratio = NewTokenRatio(1.0)
    ratio.after_retraction([make(10, 100, 30), make(10, 99, 50)])
    assert ratio.value == pytest.approx((30 + 50 + 2 * 20) / 200)
    ratio.after_retraction([make(10, 10, 5)])
    assert ratio.value == 1.0
    ratio.after_retraction([make(10, 100_000, 5)])
    assert ratio.value == pytest.approx(0.098)


@pytest.mark.parametrize(
    ("request_", "ratio", "pages"),
    [
        (make(64, 1), 1.0, 1),  # the only token sampled needs no KV
        (make(64, 2), 1.0, 2),
        (make(64, 0), 1.0, 1),
        (make(64, 129), 0.5, 2),  # 64 + 128 / 2
        (make(64, 131), 0.5, 3),
        (make(60, 5, num_output=4, num_pending=1), 1.0, 1),  # 65 tokens, the last one never computed
        (make(64, 100_000), 1.0, 65),  # no more than 4096 are expected
    ],
)
def test_expected_pages(request_: Request, ratio: float, pages: int) -> None:
    assert expected_pages(request_, ratio) == pages
