"""Responses that a client may name later, in memory: GET, DELETE, `previous_response_id`, `item_reference`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baleen.server.turns import Message

MAX_RESPONSES = 1024
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StoredResponse:
    """body       the JSON that was answered
    messages   the whole conversation up to and including the answer, without `instructions`
    items      the output items
    num_bytes  about what it takes; an earlier response's messages count again
    """

    body: bytes
    messages: Sequence[Message]
    items: Sequence[dict[str, Any]]
    num_bytes: int


class ResponseStore:
    """The newest responses; the oldest go first when there are too many or too large ones.

    enabled   False: nothing is kept, as another API process may get the request that names a response
    """

    def __init__(self, *, enabled: bool, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self.enabled = enabled
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}

    def put(self, response_id: str, response: StoredResponse) -> None:
        self._responses[response_id] = response
        self._items |= {item["id"]: item for item in response.items}
        self._num_bytes += response.num_bytes
        while len(self._responses) > self._max_responses or self._num_bytes > self._max_bytes:
            self.delete(next(iter(self._responses)))

    def get(self, response_id: str) -> StoredResponse | None:
        return self._responses.get(response_id)

    def item(self, item_id: str) -> dict[str, Any] | None:
        """An output item of a stored response."""
        return self._items.get(item_id)

    def delete(self, response_id: str) -> bool:
        """False if there is none."""
        response = self._responses.pop(response_id, None)
        if response is None:
            return False
        self._num_bytes -= response.num_bytes
        for item in response.items:
            del self._items[item["id"]]
        return True
