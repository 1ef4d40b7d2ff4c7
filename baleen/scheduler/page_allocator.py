"""The free pages of the KV pool."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page ids 1..num_pages. Page 0 is where the runner dumps padding, so it is never handed out.

    There are no reference counts: sharing is the prefix cache's affair, which owns what it shares.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack: the page freed last is handed out first. Reversed, so that a fresh pool starts with page 1.
        self._free = list(range(num_pages, 0, -1))
        self._is_free = bytearray(b"\1" * (num_pages + 1))
        self._is_free[0] = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages. Raises ValueError if there are fewer: the caller evicts first."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back. Raises ValueError for a page that is free already or was never handed out."""
        for page in pages:
            if not 1 <= page <= self.num_pages or self._is_free[page]:
                raise ValueError(f"page {page} freed, but it is not handed out")
            self._is_free[page] = 1
            self._free.append(page)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for checks."""
        return list(self._free)
