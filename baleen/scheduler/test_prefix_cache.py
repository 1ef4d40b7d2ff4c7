from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baleen.scheduler.prefix_cache import Node, PrefixCache


def keys(text: str) -> list[bytes]:
    """One page per letter."""
    return [letter.encode() for letter in text]


def fill(cache: PrefixCache, text: str, pages: list[int]) -> list[int]:
    """A request without a prefix hit comes and goes."""
    cache.lock(cache.root)
    return cache.absorb(cache.root, keys(text), pages)


def test_match_is_the_longest_cached_prefix() -> None:
    cache = PrefixCache()
    fill(cache, "abc", [1, 2, 3])
    fill(cache, "abx", [11, 12, 13])
    assert cache.pages(cache.match(keys("abcd"))) == [1, 2, 3]
    assert cache.pages(cache.match(keys("abx"))) == [1, 2, 13]
    assert cache.pages(cache.match(keys("a"))) == [1]
    assert cache.match(keys("b")) is cache.root
    assert cache.pages(cache.root) == []


def test_absorb_returns_what_the_tree_had() -> None:
    cache = PrefixCache()
    assert fill(cache, "ab", [1, 2]) == []
    assert fill(cache, "abc", [11, 12, 13]) == [11, 12]
    assert cache.pages(cache.match(keys("abc"))) == [1, 2, 13]
    assert cache.num_pages == cache.num_evictable == 3


def test_extend_stops_at_a_page_from_someone_else() -> None:
    cache = PrefixCache()
    fill(cache, "ab", [1, 2])
    cache.lock(cache.root)
    node = cache.extend(cache.root, keys("abc"), [11, 12, 13])
    assert node is cache.root
    cache.lock(cache.root)
    node = cache.extend(cache.root, keys("xy"), [21, 22])
    assert cache.pages(node) == [21, 22]
    assert (cache.num_pages, cache.num_evictable) == (4, 2)
    cache.check([node])


def test_evicts_leaves_least_recently_released_first() -> None:
    cache = PrefixCache()
    fill(cache, "ab", [1, 2])
    fill(cache, "xyz", [11, 12, 13])
    fill(cache, "m", [21])
    assert cache.evict(2) == [2, 1]
    assert cache.evict(4) == [13, 12, 11, 21]
    assert cache.num_pages == 0


def test_use_makes_recent() -> None:
    cache = PrefixCache()
    fill(cache, "ab", [1, 2])
    fill(cache, "xy", [11, 12])
    node = cache.match(keys("a"))
    cache.lock(node)
    cache.unlock(node)  # a is now the most recent, b still the oldest
    assert cache.evict(4) == [2, 12, 11, 1]


def test_matching_alone_is_no_use() -> None:
    cache = PrefixCache()
    fill(cache, "a", [1])
    fill(cache, "b", [2])
    cache.match(keys("a"))
    assert cache.evict(1) == [1]


def test_locked_paths_stay() -> None:
    cache = PrefixCache()
    fill(cache, "abc", [1, 2, 3])
    fill(cache, "abx", [0, 0, 4])
    node = cache.match(keys("ab"))
    cache.lock(node)
    cache.lock(node)
    assert cache.num_evictable == 2
    cache.unlock(node)
    assert cache.evict(9) == [3, 4]
    cache.unlock(node)
    with pytest.raises(ValueError, match="unlocked more often"):
        cache.unlock(node)
    assert cache.evict(9) == [2, 1]


def test_drop_removes_only_what_no_one_else_uses() -> None:
    cache = PrefixCache()
    fill(cache, "abcd", [1, 2, 3, 4])
    fill(cache, "abx", [0, 0, 5])
    assert cache.drop(cache.match(keys("abcd"))) == [4, 3]
    assert cache.drop(cache.match(keys("ab"))) == []
    node = cache.match(keys("abx"))
    cache.lock(node)
    assert cache.drop(node) == []
    cache.check([node])
    cache.unlock(node)
    assert cache.evict(9) == [5, 2, 1], "dropped pages are not evicted again"


def test_flush() -> None:
    cache = PrefixCache()
    fill(cache, "ab", [1, 2])
    node = cache.match(keys("a"))
    cache.lock(node)
    with pytest.raises(ValueError, match="1 cached pages are in use"):
        cache.flush()
    cache.unlock(node)
    assert sorted(cache.flush()) == [1, 2]
    assert cache.match(keys("a")) is cache.root
    assert cache.evict(1) == []


def test_the_eviction_heap_does_not_grow_with_use() -> None:
    cache = PrefixCache()
    fill(cache, "ab", [1, 2])
    node = cache.match(keys("ab"))
    for _ in range(1000):
        cache.lock(node)
        cache.unlock(node)
    assert len(cache._heap) <= cache.num_pages


class AgainstADict(RuleBasedStateMachine):
    """The tree against a dict path -> (page, time of last release), evicting by a full search."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache()
        self.fresh = count(1)
        self.clock = 0
        self.pages: dict[str, int] = {}
        self.released: dict[str, int] = {}
        self.locked: list[tuple[str, Node]] = []

    def in_use(self, path: str) -> bool:
        return any(text.startswith(path) for text, _ in self.locked)

    def release(self, text: str) -> None:
        """`text` is not locked any more: the part of its path that no one else uses was used until now."""
        self.clock += 1
        for end in range(1, len(text) + 1):
            if not self.in_use(text[:end]):
                self.released[text[:end]] = self.clock

    @rule(text=st.text("abc", min_size=1, max_size=5))
    def come_and_go(self, text: str) -> None:
        pages = [next(self.fresh) for _ in text]
        duplicates = fill(self.cache, text, pages)
        expected = []
        for end, page in enumerate(pages, 1):
            if text[:end] in self.pages:
                expected.append(page)
            else:
                self.pages[text[:end]] = page
        assert duplicates == expected
        self.release(text)

    @rule(text=st.text("abc", min_size=1, max_size=5), more=st.text("abc", max_size=2))
    def come_and_stay(self, text: str, more: str) -> None:
        node = self.cache.match(keys(text))
        text = text[: node.depth]
        assert self.cache.pages(node) == [self.pages[text[:end]] for end in range(1, len(text) + 1)]
        self.cache.lock(node)
        self.locked.append((text, node))
        node = self.cache.extend(node, keys(more), [next_page := next(self.fresh) for _ in more])
        del self.locked[-1]
        if more and text + more[0] not in self.pages:
            taken = node.depth - len(text)
            for end in range(1, taken + 1):
                self.pages[text + more[:end]] = self.cache.pages(node)[len(text) + end - 1]
            assert taken == len(more)
            assert node.page == next_page
            text += more
        assert node.depth == len(text)
        self.locked.append((text, node))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        text, node = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.cache.unlock(node)
        self.release(text)

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        expected = []
        while len(expected) < count:
            leaves = [
                path
                for path in self.pages
                if not self.in_use(path) and not any(other[:-1] == path for other in self.pages)
            ]
            if not leaves:
                break
            oldest = min(leaves, key=lambda path: self.released[path])
            assert sum(self.released[leaf] == self.released[oldest] for leaf in leaves) == 1
            expected.append(self.pages.pop(oldest))
        assert self.cache.evict(count) == expected

    @invariant()
    def agrees(self) -> None:
        assert sorted(self.cache.check([node for _, node in self.locked])) == sorted(self.pages.values())
        assert self.cache.num_evictable == sum(not self.in_use(path) for path in self.pages)


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
