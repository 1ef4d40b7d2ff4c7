"""The kernels of one step, in order, with the pauses between them: from a list of GPU activities to a table.

Pure: knows no profiler. `runner.measurement.record` makes the list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median

MOST_LINES = 280
MOST_KERNELS = 24  # in the list by name
MOST_NUMBERS = 10  # of a kernel's template
NAME_WIDTH = 78

_WORDS = re.compile(r"\b[A-Za-z_]\w*")
_NUMBERS = re.compile(r"\b\d+(?=u?\b)")
# words of template arguments that tell nothing
_NOISE = {
    "void", "const", "int", "unsigned", "long", "float", "char", "bool", "true", "false", "native", "std", "array",
    "detail", "lambda", "operator", "cutlass", "anonymous", "namespace", "instance", "TensorIteratorBase",
    "gpu_kernel_impl", "gpu_kernel_impl_nocast", "c10",
}  # fmt: skip


@dataclass(frozen=True)
class Activity:
    """A kernel, copy or fill on the GPU. Times in microseconds.

    launch  what started it, one number for all kernels of a graph
    blocks  thread blocks of a kernel
    """

    name: str
    start: float
    duration: float
    launch: int = 0
    blocks: int = 0

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Step:
    """Activities in order of start. Idle time is what no activity covers, between the first and the last."""

    activities: tuple[Activity, ...]

    @property
    def span(self) -> float:
        return max(a.end for a in self.activities) - self.activities[0].start

    @property
    def idle(self) -> float:
        return sum(max(0.0, gap) for gap in self.gaps()[1:])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.activities)

    def gaps(self) -> list[float]:
        """Time before each activity since those before it have ended; negative where they overlap; 0 for the first."""
        gaps, end = [], self.activities[0].start
        for activity in self.activities:
            gaps.append(activity.start - end)
            end = max(end, activity.end)
        return gaps


def steps(activities: Sequence[Activity], count: int) -> list[Step]:
    """Cut what ran during `count` steps, where their graphs start if each has one or more, else into equal parts where
    they are equal; else all of it is one step.
    """
    ordered = sorted(activities, key=lambda a: a.start)
    if not ordered:
        return []
    graphs = graph_steps(ordered)
    if count > 1 and len(graphs) == count:
        return graphs
    size, rest = divmod(len(ordered), max(count, 1))
    parts = [Step(tuple(ordered[i * size : (i + 1) * size])) for i in range(count)] if not rest else []
    if parts and all(part.names == parts[0].names for part in parts):
        return parts
    return [Step(tuple(ordered))]


def graph_steps(activities: Sequence[Activity]) -> list[Step]:
    """Steps that begin with a graph each and end before the next step; what ran before the first is left out.

    Of several graphs a step, which begin with different kernels, the first is the smallest.
    """
    ordered = sorted(activities, key=lambda a: a.start)
    sizes = Counter(a.launch for a in ordered)
    first: dict[int, int] = {}  # place of each graph's first kernel
    for i, activity in enumerate(ordered):
        if sizes[activity.launch] > 1:
            first.setdefault(activity.launch, i)
    if not first:
        return []
    counts = Counter(ordered[i].name for i in first.values())
    most = max(counts.values())  # of a graph that was cut off where the record began there is one
    whole = [launch for launch, i in first.items() if 2 * counts[ordered[i].name] > most]
    begins = ordered[first[min(whole, key=lambda launch: sizes[launch])]].name
    starts = [i for i in first.values() if ordered[i].name == begins]
    return [Step(tuple(ordered[a:b])) for a, b in pairwise([*starts, len(ordered)])]


def idle_shares(activities: Sequence[Activity]) -> dict[str, float]:
    """Of the time from the first to the last activity: the part without any, and how it splits into pauses between
    kernels of one graph and pauses outside of graphs (between steps).
    """
    ordered = sorted(activities, key=lambda a: a.start)
    whole = Step(tuple(ordered))
    sizes = Counter(a.launch for a in ordered)
    inside = outside = 0.0
    for (before, after), gap in zip(pairwise(ordered), whole.gaps()[1:]):
        if gap > 0 and before.launch == after.launch and sizes[after.launch] > 1:
            inside += gap
        elif gap > 0:
            outside += gap
    return {"idle": whole.idle / whole.span, "in graphs": inside / whole.span, "between": outside / whole.span}


def short(name: str) -> str:
    """A kernel's name without namespaces, types and most template arguments; numbers among these stay."""
    text = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    head, _, arguments = text.partition("<")
    head = head.split("(")[0].split("::")[-1].strip()
    arguments = arguments.split(">(")[0]
    words = [word for word in _WORDS.findall(arguments) if word not in _NOISE and len(word) > 2 and word not in head]
    numbers = _NUMBERS.findall(arguments)[:MOST_NUMBERS]
    # DeepGEMM's shapes and tiles are numbers; elsewhere a functor says more
    extra = ",".join(numbers if "deep_gemm" in text or not words else list(dict.fromkeys(words))[:3])
    return (f"{head}<{extra}>" if extra else head)[:NAME_WIDTH]


def _num_alike(layers: list[Sequence[str]]) -> int:
    return sum(a == b for a, b in pairwise(layers))


@dataclass(frozen=True)
class Section:
    """Activities i..j of a step that belong together. label: "layer 3", or what comes before or after the layers."""

    label: str
    first: int
    last: int


def sections(names: Sequence[str], num_layers: int) -> list[Section]:
    """Cut a step into its layers. A layer begins with a kernel that every layer runs once: of these, the one that makes
    most layers alike, the earliest of equals. The last one ends where it no longer does what the one before it did.
    """
    counts = Counter(names)
    places = [
        [i for i, name in enumerate(names) if name == begin]
        for begin in dict.fromkeys(names)
        if counts[begin] == num_layers
    ]
    if not places or num_layers < 2:
        return [Section("step", 0, len(names))]
    starts = max(places, key=lambda starts: _num_alike([names[a:b] for a, b in pairwise(starts)]))
    before, last = names[starts[-2] : starts[-1]], names[starts[-1] :]
    same = next((i for i, (a, b) in enumerate(zip(before, last)) if a != b), min(len(before), len(last)))
    found = [Section("before", 0, starts[0])] if starts[0] else []
    ends = [*starts[1:], starts[-1] + same]
    found += [Section(f"layer {i}", a, b) for i, (a, b) in enumerate(zip(starts, ends))]
    if ends[-1] < len(names):
        found.append(Section("after", ends[-1], len(names)))
    return found


def table(title: str, activities: Sequence[Activity], count: int, num_layers: int) -> str:
    """The text of a profile: totals of a step, its kernels in order, layers that run the same kernels as one with
    medians, and the kernels by name.
    """
    cut = steps(activities, count)
    if not cut:
        return f"{title}\nno GPU activity was recorded\n"
    cut.sort(key=lambda step: step.span)
    step = cut[len(cut) // 2]
    alike = [other for other in cut if other.names == step.names]
    between = [b.activities[0].start - max(a.end for a in a.activities) for a, b in _neighbours(cut)]
    lines = [
        title,
        f"steps {len(cut)}, of which {len(alike)} run the same kernels; the median one: {len(step.activities)} kernels,"
        f" span {step.span:.1f} us, busy {step.span - step.idle:.1f}, idle {step.idle:.1f}"
        f" ({100 * step.idle / step.span:.1f} %)" + (f"; between steps {median(between):.1f} us" if between else ""),
        "",
        f"{'gap us':>9}{'us':>10}{'blocks':>8}  kernel",
    ]
    gaps = [median(values) for values in zip(*(other.gaps() for other in alike))]
    times = [median(a.duration for a in each) for each in zip(*(other.activities for other in alike))]
    names = [short(name) for name in step.names]
    blocks = [activity.blocks for activity in step.activities]
    for group in _alike(sections(names, num_layers), names):
        lines += _section(group, list(zip(gaps, times, blocks, names)))
    if len(lines) > MOST_LINES - MOST_KERNELS:
        kept = MOST_LINES - MOST_KERNELS - 1
        lines = [*lines[:kept], f"... {len(lines) - kept} more lines"]
    return "\n".join([*lines, "", *_by_name(names, times, step.span)]) + "\n"


def _neighbours(cut: list[Step]) -> list[tuple[Step, Step]]:
    return list(pairwise(sorted(cut, key=lambda step: step.activities[0].start)))


def _alike(found: list[Section], names: list[str]) -> list[list[Section]]:
    """Consecutive sections that run the same kernels."""
    return [list(group) for _, group in groupby(found, key=lambda s: (s.label.split()[0], names[s.first : s.last]))]


def _section(group: list[Section], kernels: list[tuple[float, float, int, str]]) -> list[str]:
    """Lines of one section, or of several that run the same kernels: kernels are (gap, time, blocks, name)."""
    first = group[0]
    label = first.label if len(group) == 1 else f"{first.label} to {group[-1].label.split()[-1]}, each"
    rows = []
    for i in range(first.first, first.last):
        places = [kernels[section.first + i - first.first] for section in group]
        rows.append((median(p[0] for p in places), median(p[1] for p in places), *kernels[i][2:]))
    gap_us, busy_us = sum(row[0] for row in rows), sum(row[1] for row in rows)
    lines = [f"-- {label}: {len(rows)} kernels, {busy_us:.1f} us and {gap_us:.1f} of gaps"]
    for (blocks, name), same in groupby(rows, key=lambda row: row[2:]):
        run = [row[:2] for row in same]
        if len(run) > 2:
            run, name = [(sum(row[0] for row in run), sum(row[1] for row in run))], f"{len(run)} times {name}"
        lines += [f"{gap:9.1f}{us:10.1f}{blocks or '-':>8}  {name}" for gap, us in run]
    return lines


def _by_name(names: list[str], times: list[float], span: float) -> list[str]:
    total: dict[str, list[float]] = {}
    for name, us in zip(names, times):
        total.setdefault(name, []).append(us)
    ordered = sorted(total.items(), key=lambda item: -sum(item[1]))
    lines = [f"{'us':>9}{'%':>7}{'calls':>7}  kernel"]
    for name, each in ordered[:MOST_KERNELS]:
        lines.append(f"{sum(each):9.1f}{100 * sum(each) / span:7.1f}{len(each):7d}  {name}")
    if len(ordered) > MOST_KERNELS:
        rest = sum(sum(each) for _, each in ordered[MOST_KERNELS:])
        lines.append(f"{rest:9.1f}{100 * rest / span:7.1f}         {len(ordered) - MOST_KERNELS} others")
    return lines
