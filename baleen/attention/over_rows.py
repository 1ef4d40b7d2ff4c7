"""Attention by a library's kernel over rows of the latent cache: all but the call."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from baleen.attention.absorbed import Latents, absorb, position_slots
from baleen.attention.batch import Group
from baleen.attention.kv_pool import KVPool, PackedLatent
from baleen.attention.selection import Form, visible_positions


class OverRows:
    """A `backend.Attention` in the absorbed form; a subclass has the kernel, as `over`.

    The rows are the pool's own or, for a prefill chunk over an fp8 cache, the context's, dequantised first, which
    costs little beside a chunk of queries. multiple: of the number of indices of a query.
    """

    multiple = 1

    def __init__(self, pool: KVPool, softmax_scale: float, dense_prefill_threshold: int) -> None:
        self.pool = pool
        self.softmax_scale = softmax_scale
        self._dequantizes = isinstance(pool.latent[0], PackedLatent)
        self._counted: tuple[Tensor, int, Tensor] | None = None

    def over(self, query: Tensor, rows: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """Every head attends to the rows of its token.

        query    [T, H, latent + rope]
        rows     [N, latent + rope], of the query's dtype
        indices  [T, k] int32 into the rows, then -1
        counts   [T] int32, how many of them are not -1: at least 1
        returns  [T, H, latent]
        """
        raise NotImplementedError

    def form(self, group: Group) -> Form:
        return "rows" if self._dequantizes else "slots"

    def everything(self, group: Group) -> Tensor:
        positions = visible_positions(group)
        return self._padded(positions if self._dequantizes else position_slots(group, positions))

    def queries(self, group: Group, q: Tensor, cos: Tensor, sin: Tensor, kv_b: Tensor) -> Tensor:
        return absorb(q, cos, sin, kv_b)

    def attend(self, layer: int, group: Group, q: Tensor, kv_b: Tensor, selection: Tensor | None) -> Latents:
        """See `backend.Attention.attend`."""
        assert selection is not None
        rows = self.pool.latent[layer]
        if isinstance(rows, PackedLatent):
            assert group.num_requests == 1, "decode reads a bfloat16 cache"
            rows = self.pool.read_latent(layer, group.context_slots(), q.dtype)
        counts = self._counts(group.lengths, selection.shape[1])
        out = self.over(q, rows, self._padded(selection), counts)
        return Latents(out)

    def _counts(self, lengths: Tensor, most: int) -> Tensor:
        """lengths [T] int64 -> [T] int32, at most `most`. Every layer of a step asks the same."""
        if self._counted is None or self._counted[0] is not lengths or self._counted[1] != most:
            self._counted = lengths, most, lengths.clamp_max(most).int()
        return self._counted[2]

    def _padded(self, selection: Tensor) -> Tensor:
        """[T, k] -> int32 [T, k'], filled up with -1."""
        missing = -selection.shape[1] % self.multiple
        return pad(selection.int(), (0, missing), value=-1) if missing else selection.int()
