"""The pages of the KV pool and who has them: free, shared by the prefix cache, or filled by one running request."""

from __future__ import annotations

from collections.abc import Sequence

from baleen.scheduler.admission import expected_pages
from baleen.scheduler.page_allocator import PageAllocator
from baleen.scheduler.prefix_cache import Node, PrefixCache
from baleen.scheduler.request import Request


class PagePool:
    """Each page has exactly one owner at any time: the allocator, the tree, or one running request.

    num_pages    pages of the pool, without page 0
    page_size    tokens
    use_cache    False: nothing is ever put in the tree
    num_evicted  pages taken from the tree since the start, for others
    """

    def __init__(self, num_pages: int, page_size: int, *, use_cache: bool) -> None:
        self.num_pages = num_pages
        self.num_evicted = 0
        self._page_size = page_size
        self._use_cache = use_cache
        self._allocator = PageAllocator(num_pages)
        self._cache = PrefixCache()

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_cached(self) -> int:
        return self._cache.num_pages

    @property
    def num_evictable(self) -> int:
        return self._cache.num_evictable

    @property
    def num_available(self) -> int:
        return self._allocator.num_free + self._cache.num_evictable

    # ---- a request enters --------------------------------------------------------------------------------------------

    def match(self, request: Request) -> Node:
        """The longest cached prefix that the request may use: the root, when nothing is ever put in the tree."""
        return self._cache.match(request.page_keys(0, request.max_cached_pages))

    def page_in_work(self, request: Request) -> tuple[Node, bytes] | None:
        """The parent and key a prefilling request's next page will have in the tree; None if it will not go there."""
        node = request.node
        if node is None or not self._use_cache or (node.depth + 1) * self._page_size > len(request.token_ids):
            return None
        return node, request.page_keys(node.depth, node.depth + 1)[0]

    def enter(self, request: Request, node: Node, growth: int) -> bool:
        """Gives a waiting request the cached prefix up to `node` and pages for its other known tokens.

        False, and nothing given, if the request with all it may generate does not fit the pages that are free or
        evictable, less `growth`.
        """
        self._cache.lock(node)
        if expected_pages(request, 1.0) - node.depth > self.num_available - growth:
            self._cache.unlock(node)
            return False
        num_pages = -(-len(request.token_ids) // self._page_size)
        request.node = node
        request.pages = self._cache.pages(node) + self._take(num_pages - node.depth)
        request.num_computed = node.depth * self._page_size
        return True

    # ---- it runs -----------------------------------------------------------------------------------------------------

    def grow(self, request: Request) -> None:
        """One more page. The caller has checked that one is available."""
        request.pages += self._take(1)

    def _take(self, count: int) -> list[int]:
        """Free pages, made by eviction if need be. The caller has checked that there are enough of both."""
        missing = count - self._allocator.num_free
        if missing > 0:
            evicted = self._cache.evict(missing)
            self.num_evicted += len(evicted)
            self._allocator.free(evicted)
        return self._allocator.take(count)

    def share_full_pages(self, request: Request) -> None:
        """Puts the pages that a prefill chunk has filled into the tree; the request goes on using them."""
        node = request.node
        assert node is not None
        stop = request.num_full_pages
        if self._use_cache and stop > node.depth:
            request.node = self._cache.extend(
                node, request.page_keys(node.depth, stop), request.pages[node.depth : stop]
            )

    # ---- it leaves ---------------------------------------------------------------------------------------------------

    def leave(self, request: Request) -> None:
        """Takes all pages from a request. Its full ones stay in the tree, the rest is free at once."""
        node, pages = request.node, request.pages
        assert node is not None
        stop = request.num_full_pages if self._use_cache else node.depth
        duplicates = self._cache.absorb(node, request.page_keys(node.depth, stop), pages[node.depth : stop])
        self._allocator.free(duplicates)
        self._allocator.free(pages[stop:])
        request.node, request.pages = None, []

    def forget(self, request: Request) -> None:
        """Takes the pages of a request that has left out of the tree, but those that others use or have continued."""
        full_pages = len(request.token_ids) // self._page_size
        self._allocator.free(self._cache.drop(self._cache.match(request.page_keys(0, full_pages))))

    def flush(self) -> None:
        """Empties the prefix cache. Raises ValueError if a request uses it."""
        self._allocator.free(self._cache.flush())

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, running: Sequence[Request]) -> None:
        """Recounts who owns what, in O(pages). Raises AssertionError if a page is lost or owned twice."""
        nodes = [request.node for request in running if request.node is not None]
        assert len(nodes) == len(running)
        cached = self._cache.check(nodes)
        free = self._allocator.free_pages()
        private = [page for request, node in zip(running, nodes) for page in request.pages[node.depth :]]
        assert sorted(free + cached + private) == list(range(1, self.num_pages + 1)), "a page is lost or has two owners"
        for request, node in zip(running, nodes):
            assert request.pages[: node.depth] == self._cache.pages(node), f"{request.rid}: page table and tree differ"
            assert request.num_computed <= len(request.pages) * self._page_size, f"{request.rid}: page missing"
            assert request.num_sent <= len(request.pages)
