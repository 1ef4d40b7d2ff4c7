"""The indexer and the attention of the training network: dense, or through the indexer's top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.tiny.documents import Documents, Group
from recipes.tiny.layers import Linear, RMSNorm


@dataclass
class Report:
    """Of one layer, summed over sampled queries that see more than top-k tokens, and their number.

    kl        indexer's distribution from the attention's
    spread    -log of the attention mass inside the wanted set (see `Attention.look`), mean over heads
    mass      attention mass inside the indexer's top-k; oracle: inside the best possible top-k
    """

    kl: Tensor
    spread: Tensor
    mass: Tensor
    oracle: Tensor
    queries: int


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, (H,) D], pairs (2i, 2i+1); cos, sin [T, D/2]."""
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, (H,) D], pairs (i, i + D/2); cos, sin [T, D/2]."""
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def rope_index(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The indexer's: x [T, (H,) D], its first dims, as many as cos and sin say, pairs half of them apart."""
    size = 2 * cos.shape[-1]
    return torch.cat([rope_half(x[..., :size], cos, sin), x[..., size:]], -1)


class Indexer(nn.Module):
    """The lightning indexer. Its inputs are detached by the caller: only its own loss trains it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.dim = config["index_n_heads"], config["index_head_dim"]
        self.wq_b = Linear(config["q_lora_rank"], self.heads * self.dim)
        self.wk = Linear(config["hidden_size"], self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(config["hidden_size"], self.heads, bias=False)
        self.rope = rope_index  # ablations put another one here

    def queries(self, q_latent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, q_lora_rank] after its norm -> [T, H, D]."""
        return self.rope(self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim)), cos, sin)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, hidden] -> [T, D]."""
        k = self.wk(x)
        k = F.layer_norm(k.float(), (self.dim,), self.k_norm.weight, self.k_norm.bias, 1e-6).to(k.dtype)
        return self.rope(k, cos, sin)

    def gates(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, H] float32."""
        return self.weights_proj(x).float() * (self.heads**-0.5 * self.dim**-0.5)


def index_scores(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """q [B, Q, H, D], gates [B, Q, H] float32, keys [B, S, D] -> [B, Q, S] float32 = sum_h gate * relu(q . k)."""
    products = F.relu(torch.matmul(q.flatten(1, 2), keys.transpose(1, 2))).unflatten(1, q.shape[1:3])  # [B, Q, H, S]
    return torch.matmul(gates.to(products.dtype)[:, :, None], products)[:, :, 0].float()


def causal_scores(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """`index_scores` of every query of documents [B, L] with the keys up to it, -inf after it; no gradient."""
    if q.is_cuda:
        from recipes.tiny.index_kernel import causal_index_scores

        return causal_index_scores(q, gates, keys)
    size, length, heads, _ = q.shape
    out = torch.full((size, length, length), float("-inf"))
    step = max(1, (64 << 20) // (size * length * heads))
    for first in range(0, length, step):
        last = min(first + step, length)
        scores = index_scores(q[:, first:last], gates[:, first:last], keys[:, :last])
        visible = torch.arange(last) <= torch.arange(first, last)[:, None]
        out[:, first:last, :last] = scores.masked_fill(~visible, float("-inf"))
    return out


class Attention(nn.Module):
    """MLA in its multi-head form (keys and values expanded from the latent)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.nope, self.rope, self.v = (
            config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"],
        )  # fmt: skip
        self.latent, self.topk = config["kv_lora_rank"], config["index_topk"]
        self.random = False  # ablation: any tokens instead of the indexer's
        eps, q_rank = config["rms_norm_eps"], config["q_lora_rank"]
        self.q_a_proj = Linear(hidden, q_rank)
        self.q_a_layernorm = RMSNorm(q_rank, eps)
        self.q_b_proj = Linear(q_rank, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, eps)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.v))
        self.kv_b_proj.fp8_input = False
        self.o_proj = Linear(self.heads * self.v, hidden)
        self.indexer = Indexer(config)
        scaling = config["rope_scaling"]
        amplitude = 1.0
        if scaling is not None and scaling["factor"] > 1:
            amplitude = 0.1 * scaling["mscale_all_dim"] * torch.log(torch.tensor(float(scaling["factor"]))).item() + 1
        self.scale = (self.nope + self.rope) ** -0.5 * amplitude**2

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, hidden] normed -> q, k [T, H, nope + rope], v [T, H, v], q latent [T, q_lora_rank]."""
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, -1))
        q = torch.cat([q[..., : self.nope], rope_interleaved(q[..., self.nope :], cos, sin)], -1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1))
        k_pe = rope_interleaved(k_pe, cos, sin)[:, None].expand(-1, self.heads, -1)
        k = torch.cat([kv[..., : self.nope], k_pe], -1)
        return q, k, kv[..., self.nope :], q_latent

    def dense(self, q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
        """Causal attention inside each document, [T, H, v]."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            v = F.pad(v, (0, q.shape[-1] - self.v))
            cu, top = docs.cu_seqlens, docs.max_len
            out = torch.ops.aten._flash_attention_forward(
                q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, top, top, 0.0, True, False, scale=self.scale
            )[0]
            return out[..., : self.v]
        out = q.new_zeros(*q.shape[:2], self.v)
        pieces = []
        end = 0
        for start, end in docs.spans:
            heads = (t[None, start:end].transpose(1, 2) for t in (q, k, v))
            pieces.append(F.scaled_dot_product_attention(*heads, is_causal=True, scale=self.scale)[0].transpose(0, 1))
        return torch.cat([*pieces, out[end:]])

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, index: tuple[Tensor, Tensor, Tensor], docs: Documents) -> Tensor:
        """Attention to the indexer's top-k, [T, H, v]. index: queries, gates, keys, without gradient."""
        pieces: list[Tensor] = []
        head = docs.head(self.topk)
        if head is not None:
            end = len(head.positions)
            pieces.append(self.dense(q[:end], k[:end], v[:end], head))
        for group in docs.groups:
            bias = self.selection(*(group.gather(t.detach()) for t in index)).to(q.dtype)
            heads = [group.gather(t).transpose(1, 2) for t in (q, k, v)]
            # cuDNN would plan anew for every length
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                out = F.scaled_dot_product_attention(*heads, attn_mask=bias[:, None], scale=self.scale)
            pieces.append(group.scatter(out.transpose(1, 2)))
        return torch.cat(pieces)

    @torch.no_grad()
    def selection(self, index_q: Tensor, gates: Tensor, index_k: Tensor) -> Tensor:
        """Documents [B, L]: 0 at the top-k of each query, -inf elsewhere, [B, L, L]."""
        scores = causal_scores(index_q, gates, index_k)
        if self.random:
            scores = torch.rand_like(scores).masked_fill_(scores == float("-inf"), float("-inf"))
        best, chosen = scores.topk(min(self.topk, scores.shape[-1]), -1, sorted=False)
        bias = scores.fill_(float("-inf"))
        return bias.scatter_(-1, chosen, torch.where(best == float("-inf"), best, 0.0))

    def look(
        self, q: Tensor, k: Tensor, index: tuple[Tensor, Tensor, Tensor] | None, docs: Documents, per_doc: int, *,
        spread: bool, recent: float = 0.25,
    ) -> Report:  # fmt: skip
        """Compare the indexer with the attention (summed over heads, L1-normalised) at sampled queries.

        index    None: only the attention is looked at
        per_doc  queries sampled of each document that is longer than top-k
        spread   with gradient to q and k: -log of the mass inside the indexer's top-k, or without `index` inside the
                 best half top-k
        recent   this share of the queries is taken of the last 256 tokens, where questions are; kl and spread only
        """
        if not spread:
            q, k = q.detach(), k.detach()
        total = [q.new_zeros((), dtype=torch.float32) for _ in range(4)]
        queries = 0
        for group in docs.groups:
            rows = self._sample(group, per_doc, recent)
            wide = rows.shape[1] - int(rows.shape[1] * recent)  # sampled anywhere
            picked = (group.starts[:, None] + rows).flatten()
            visible = torch.arange(group.length, device=q.device) <= rows[..., None]  # [B, R, L]
            asked = q.index_select(0, picked).unflatten(0, rows.shape)
            logits = torch.einsum("brhd,blhd->bhrl", asked, group.gather(k)).float() * self.scale
            logits = logits.masked_fill(~visible[:, None], float("-inf"))
            with torch.no_grad():
                target = logits.softmax(-1).mean(1)
                best = target.topk(min(self.topk, group.length), -1)
            wanted = best.indices[..., : self.topk // 2]
            mass = best.values.sum(-1)
            total[3] = total[3] + mass[:, :wide].sum() * (rows.shape[1] / wide)
            if index is not None:
                of_rows = (t.index_select(0, picked).unflatten(0, rows.shape) for t in index[:2])
                scores = index_scores(*of_rows, group.gather(index[2])).masked_fill(~visible, float("-inf"))
                wanted = scores.detach().topk(best.indices.shape[-1], -1).indices
                log_q = scores.log_softmax(-1).masked_fill(target <= 0, 0.0)
                total[0] = total[0] + (torch.xlogy(target, target) - target * log_q).sum()
                mass = target.gather(-1, wanted).sum(-1)
            total[2] = total[2] + mass[:, :wide].sum() * (rows.shape[1] / wide)
            if spread:
                inside = logits.gather(-1, wanted[:, None].expand(-1, self.heads, -1, -1)).logsumexp(-1)
                total[1] = total[1] + (logits.logsumexp(-1) - inside).mean(1).sum()
            queries += rows.numel()
        return Report(*total, queries)

    def _sample(self, group: Group, per_doc: int, recent: float) -> Tensor:
        """Positions [B, R] from top-k on; the last `recent` of the R among the document's last 256."""
        spare = (group.lengths - self.topk)[:, None]
        rows = (torch.rand(group.size, per_doc, device=spare.device) * spare).long() + self.topk
        near = int(per_doc * recent)
        if near:
            back = torch.rand(group.size, near, device=spare.device) * spare.clamp(max=256)
            rows[:, per_doc - near :] = group.lengths[:, None] - 1 - back.long()
        return rows
