"""The table of a step's kernels, from made-up activities."""

from __future__ import annotations

import pytest

from baleen.bench.trace import MOST_LINES, Activity, graph_steps, idle_shares, sections, short, steps, table

LAYER = ["norm", "gemm", "attention", "gemm"]
NAMES = ["plan", *LAYER, *LAYER, *LAYER[:1], "moe", *LAYER[1:], "head"]


def _activities(
    names: list[str], gap: float = 1.0, us: float = 4.0, start: float = 0.0, launch: int = 0
) -> list[Activity]:
    return [Activity(name, start + i * (us + gap), us, launch or i + 1, 8) for i, name in enumerate(names)]


def test_idle_is_what_no_activity_covers() -> None:
    activities = [Activity("a", 0, 10, 1), Activity("b", 4, 2, 1), Activity("c", 12, 3, 1), Activity("d", 20, 5, 2)]
    (step,) = steps(activities, 1)
    assert step.span == 25
    assert step.gaps() == [0, -6, 2, 5]
    assert step.idle == 7
    assert idle_shares(activities) == {"idle": 7 / 25, "in graphs": 2 / 25, "between": 5 / 25}


def test_steps_begin_with_their_graph() -> None:
    activities = [Activity("copy", 0, 1, 1)]
    for i in range(3):
        start = 10 + 100 * i
        activities += _activities(["a", "b"], start=start, launch=50 + i)
        activities += [Activity("sample", start + 20, 1, 100 + 2 * i), Activity("copy", start + 25, 1, 101 + 2 * i)]
    cut = steps(activities, 3)
    assert [step.names for step in cut] == [("a", "b", "sample", "copy")] * 3
    assert [step.activities[0].start for step in cut] == [10, 110, 210]


def test_the_smaller_of_two_graphs_begins_a_step() -> None:
    activities = _activities(["c", "e"], start=0, launch=40)  # the end of a step before the record
    for i in range(3):
        activities += _activities(["a", "b", "c"], start=10 + 100 * i, launch=50 + 2 * i)
        activities += _activities(["d", "b", "c", "e"], start=50 + 100 * i, launch=51 + 2 * i)
    assert [step.names for step in steps(activities, 3)] == [("a", "b", "c", "d", "b", "c", "e")] * 3
    assert [step.names for step in graph_steps(activities[:-7])][-1] == ("a", "b", "c", "d", "b", "c", "e")


@pytest.mark.parametrize(("count", "cut"), [(2, 2), (4, 4), (3, 1), (1, 1)])
def test_without_graphs_equal_parts_are_steps(count: int, cut: int) -> None:
    assert len(steps(_activities(["a", "b"] * 4), count)) == cut
    assert steps([], count) == []


def test_layers_are_cut_where_their_first_kernel_runs() -> None:
    cut = [(section.label, NAMES[section.first : section.last]) for section in sections(NAMES, 3)]
    assert cut[:3] == [("before", ["plan"]), ("layer 0", LAYER), ("layer 1", LAYER)]
    assert cut[3] == ("layer 2", ["norm"]), "it ends where it does something else"
    odd = ["plan", "once", "plan", *LAYER, *LAYER, *LAYER, "plan"]
    assert [s.first for s in sections(odd, 3)] == [0, 3, 7, 11, 15], "not the kernel that happens to run three times"
    plain = ["plan", *LAYER, *LAYER, "head", "sample"]
    assert [(s.label, s.first, s.last) for s in sections(plain, 2)] == [
        ("before", 0, 1),
        ("layer 0", 1, 5),
        ("layer 1", 5, 9),
        ("after", 9, 11),
    ]
    assert [s.label for s in sections(plain, 7)] == ["step"]


def test_a_table_shows_equal_layers_once() -> None:
    names = ["plan", *LAYER, *LAYER, *LAYER, "head"]
    text = table("decode step", _activities(names) + _activities(names, start=1000), 2, 3)
    lines = text.splitlines()
    assert lines[0] == "decode step"
    assert "the median one: 14 kernels, span 69.0 us, busy 56.0, idle 13.0 (18.8 %); between steps 931.0 us" in lines[1]
    assert "-- layer 0 to 2, each: 4 kernels, 16.0 us and 4.0 of gaps" in lines
    assert sum(line.endswith("attention") for line in lines) == 2, "once in order, once by name"
    assert "     24.0   34.8      6  gemm" in lines


def test_a_table_stays_short() -> None:
    text = table("x", _activities([f"kernel_{i}" for i in range(3000)]), 1, 61)
    assert len(text.splitlines()) <= MOST_LINES + 10
    assert "more lines" in text
    repeated = table("x", _activities(["a"] * 500), 1, 61)
    assert "500 times a" in repeated
    assert "no GPU activity" in table("x", [], 3, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "void deep_gemm::sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0, 0u, 24576u, 1536u, 1u, 64u>(float*, int)",
            "sm90_fp8_gemm_1d2d_impl<0,0,24576,1536,1,64>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::AbsFunctor<float>, std::array<char*, 2ul> "
            ">(int, at::native::AbsFunctor<float>, std::array<char*, 2ul>)",
            "vectorized_elementwise_kernel<AbsFunctor>",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD"),
        ("nvjet_sm90_tst_256x16_64x6_2x1_v_bz_TNT", "nvjet_sm90_tst_256x16_64x6_2x1_v_bz_TNT"),
        ("_store_keys_kernel", "_store_keys_kernel"),
        ("(anonymous namespace)::topk_kernel(float const*)", "topk_kernel"),
        ("aten::mm", "mm"),
    ],
)
def test_short_names(name: str, expected: str) -> None:
    assert short(name) == expected
