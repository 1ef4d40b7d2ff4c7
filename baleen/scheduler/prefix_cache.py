"""The prefix cache: a tree of KV pages by the tokens they hold, so that equal prefixes are computed once."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count


class Node:
    """One cached page: the KV of `page_size` tokens that follow the tokens of all its ancestors.

    key        the page's token ids as int32 bytes (one hash and one compare; bytes keep their hash)
    depth      pages from the root to here, this one included; 0 for the root, which holds no page
    num_users  requests locked exactly here + children in use; 0: evictable, and so is everything below
    last_used  tick of the release that made it evictable
    queued     it has an entry in the eviction heap
    """

    __slots__ = ("children", "depth", "key", "last_used", "num_users", "page", "parent", "queued")

    def __init__(self, parent: Node | None, key: bytes, page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.depth: int = parent.depth + 1 if parent else 0
        self.children: dict[bytes, Node] = {}
        self.num_users = 0
        self.last_used = 0
        self.queued = False


class PrefixCache:
    """A radix tree with one page per node. It owns its pages; those that leave it are returned, for the caller to free.

    A running request locks the deepest node whose path it uses. Only leaves are evicted, so that lock alone would keep
    the whole path; `num_users` also counts children in use, so that the number of evictable pages is known without a
    walk. Locking costs O(pages that change between in use and evictable).

    Least recently used means least recently released: a page in use is never a candidate.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._serial = count()  # breaks ties in the heap, where nodes themselves do not compare
        self._clear()

    def _clear(self) -> None:
        self.root = Node(None, b"", 0)
        self._num_pages = 0
        self._num_in_use = 0
        # (last_used, serial, node): every evictable leaf has one entry, other nodes at most one. Entries are not
        # removed when a node is locked or gets a child; `evict` drops or renews those it meets, so the heap never
        # outgrows the tree.
        self._heap: list[tuple[int, int, Node]] = []

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_evictable(self) -> int:
        return self._num_pages - self._num_in_use

    # ---- look up -----------------------------------------------------------------------------------------------------

    def match(self, keys: Iterable[bytes]) -> Node:
        """The deepest node on the path of `keys` (one per page). Counts as no use: lock it to keep it."""
        node = self.root
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            node = child
        return node

    @staticmethod
    def pages(node: Node) -> list[int]:
        """The page ids from the root to `node`, in token order."""
        pages = []
        while node.parent is not None:
            pages.append(node.page)
            node = node.parent
        pages.reverse()
        return pages

    def lock(self, node: Node) -> None:
        """Protects the path to `node` until `unlock`; a node may be locked many times."""
        while node.parent is not None:
            node.num_users += 1
            if node.num_users > 1:
                return
            self._num_in_use += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Gives one lock back. Raises ValueError if there is none."""
        self._clock += 1
        while node.parent is not None:
            if node.num_users == 0:
                raise ValueError(f"page {node.page} is unlocked more often than locked")
            node.num_users -= 1
            if node.num_users:
                return
            self._num_in_use -= 1
            node.last_used = self._clock
            self._queue_if_leaf(node)
            node = node.parent

    # ---- grow --------------------------------------------------------------------------------------------------------

    def extend(self, node: Node, keys: Sequence[bytes], pages: Sequence[int]) -> Node:
        """Caches pages of a request that keeps running, below the `node` it has locked. Returns where its lock moved.

        Stops at the first page that the tree has from someone else. The runner's page table can only be appended to, so
        the request stays on its own copy; were the tree's copy locked for it as well, it would occupy two pages for one
        and might not fit the pool even alone. So the copy and what follows stay private until the request leaves
        (`absorb`).
        """
        end = node
        for key, page in zip(keys, pages, strict=True):
            if key in end.children:
                break
            end = self._add_child(end, key, page)
        self.lock(end)
        self.unlock(node)
        return end

    def absorb(self, node: Node, keys: Sequence[bytes], pages: Sequence[int]) -> list[int]:
        """Caches pages of a request that leaves and gives up its lock on `node`. Returns those the tree had already."""
        duplicates = []
        end = node
        for key, page in zip(keys, pages, strict=True):
            child = end.children.get(key)
            if child is None:
                child = self._add_child(end, key, page)
            else:
                duplicates.append(page)
            end = child
        self.lock(end)
        self.unlock(node)
        self.unlock(end)
        return duplicates

    def _add_child(self, parent: Node, key: bytes, page: int) -> Node:
        """The caller locks the new node, or one below it, before anything else happens."""
        child = Node(parent, key, page)
        parent.children[key] = child
        self._num_pages += 1
        return child

    # ---- shrink ------------------------------------------------------------------------------------------------------

    def evict(self, num_pages: int) -> list[int]:
        """Removes `num_pages` pages, or all evictable ones if fewer: always the least recently released leaf."""
        pages: list[int] = []
        while len(pages) < num_pages and self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            node.queued = False
            if node.parent is None or node.num_users or node.children:
                continue  # dropped, in use, or no longer a leaf: it is queued anew when that changes
            if node.last_used != last_used:
                self._queue_if_leaf(node)  # used and released since
                continue
            pages.append(node.page)
            parent = self._remove(node)
            if parent.num_users == 0:
                self._queue_if_leaf(parent)
        return pages

    def drop(self, node: Node) -> list[int]:
        """Removes `node` and its ancestors, up to the first that another path or request uses; returns their pages."""
        pages = []
        while node.parent is not None and not node.children and node.num_users == 0:
            pages.append(node.page)
            node = self._remove(node)
        return pages

    def flush(self) -> list[int]:
        """Empties the tree and returns its pages. Raises ValueError if one is locked."""
        if self._num_in_use:
            raise ValueError(f"{self._num_in_use} cached pages are in use")
        pages = [node.page for node in self._nodes()]
        self._clear()
        return pages

    def _remove(self, leaf: Node) -> Node:
        """Cuts an unused leaf; returns its parent."""
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.key]
        leaf.parent = None
        self._num_pages -= 1
        return parent

    def _queue_if_leaf(self, node: Node) -> None:
        if node.parent is not None and not node.children and not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (node.last_used, next(self._serial), node))

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _nodes(self) -> Iterator[Node]:
        """All nodes but the root. No recursion: a path is as deep as a context has pages."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self, locked: Sequence[Node]) -> list[int]:
        """All cached pages. Raises AssertionError if the counts differ from a recount, given one node per lock."""
        nodes = list(self._nodes())
        locks = Counter(map(id, locked))
        for node in nodes:
            users = locks[id(node)] + sum(child.num_users > 0 for child in node.children.values())
            assert node.num_users == users, f"page {node.page}: num_users {node.num_users}, recounted {users}"
            assert all(child.parent is node and child.depth == node.depth + 1 for child in node.children.values())
            assert node.queued or node.num_users or node.children, f"page {node.page} can never be evicted"
        assert len({len(node.key) for node in nodes}) <= 1, "a page that is not full is shared"
        alive = {id(node) for node in nodes} | {id(self.root)}
        assert all(id(node) in alive for node in locked), "a request has locked a node that is not in the tree"
        assert self._num_pages == len(nodes)
        assert self._num_in_use == sum(node.num_users > 0 for node in nodes)
        return [node.page for node in nodes]
