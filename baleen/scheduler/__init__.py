"""Who runs next: the waiting queue, its order, the KV pages and the prefix cache. Plain Python over ints, no torch.

Lives here
    scheduler.py       `Scheduler`: requests in, one `ScheduledBatch` per step out, sampled tokens back in
    request.py         `Request`: what is known, computed, held and in flight of one request
    policy.py          `POLICIES`: the order in which waiting requests are tried
    admission.py       how many pages to keep back for tokens that are not generated yet
    counters.py        `Counters`: totals since the start, and the `EngineStats` of now
    page_pool.py       `PagePool`: who has each page
    prefix_cache.py    `PrefixCache`: radix tree of computed pages, locks, LRU eviction
    page_allocator.py  `PageAllocator`: the free pages

May import: baleen.config, baleen.messages, the standard library.

Each page of the pool has exactly one owner at any time: the allocator (free), the tree (computed, shareable), or one
running request (being filled). `Scheduler.check_invariants` recounts that from scratch; the tests call it after every
step.

To add a policy: write a function beside `fcfs`, name it in `POLICIES`; the tests run over that dict.
"""
