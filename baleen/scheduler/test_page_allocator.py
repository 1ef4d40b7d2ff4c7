from __future__ import annotations

import pytest

from baleen.scheduler.page_allocator import PageAllocator


def test_hands_out_every_page_but_0_once() -> None:
    allocator = PageAllocator(5)
    assert sorted(allocator.take(2) + allocator.take(3)) == [1, 2, 3, 4, 5]
    assert allocator.num_free == 0


def test_take_more_than_free_takes_nothing() -> None:
    allocator = PageAllocator(3)
    with pytest.raises(ValueError, match="4 pages asked for, 3 are free"):
        allocator.take(4)
    assert allocator.num_free == 3


def test_freed_pages_come_back() -> None:
    allocator = PageAllocator(3)
    pages = allocator.take(3)
    allocator.free(pages[:2])
    assert sorted(allocator.take(2)) == sorted(pages[:2])


@pytest.mark.parametrize("page", [0, -1, 4, 2])
def test_freeing_what_is_not_handed_out_is_an_error(page: int) -> None:
    allocator = PageAllocator(3)
    (taken,) = allocator.take(1)
    assert taken == 1
    with pytest.raises(ValueError, match=f"page {page} freed"):
        allocator.free([page])


def test_double_free_is_an_error() -> None:
    allocator = PageAllocator(3)
    pages = allocator.take(1)
    allocator.free(pages)
    with pytest.raises(ValueError, match="freed"):
        allocator.free(pages)
