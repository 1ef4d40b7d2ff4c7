"""The network for training: DeepSeek-V3.2 in plain PyTorch over packed documents, with checkpoint tensor names.

A batch is one row of T tokens, documents end to end; attention stays inside a document. Everything between the
attention calls has a fixed shape and compiles. All experts are computed for all tokens and weighted by the router
(0 where not chosen): at this size that is one wide MLP, faster than any dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from baleen.kernels.rope import yarn_table

TINY: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "vocab_size": 4096,
    "hidden_size": 256, "num_hidden_layers": 6, "num_nextn_predict_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "attention_bias": False, "attention_dropout": 0.0,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 256, "intermediate_size": 1024,
    "moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "max_position_embeddings": 16384, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 4, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "ep_size": 1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
MICRO: dict[str, Any] = {
    **TINY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "index_n_heads": 16, "index_head_dim": 64, "index_topk": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
}  # fmt: skip
CONFIGS = {"tiny": TINY, "micro": MICRO}
FP8_LINEARS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Documents:
    """Where the documents of a packed row lie.

    positions   [T] int64, position in the document
    cu_seqlens  [D + 1] int32, starts of the documents and the end; may repeat the end
    max_len     no document is longer
    spans       host (start, end) of each document
    """

    positions: Tensor
    cu_seqlens: Tensor
    max_len: int
    spans: list[tuple[int, int]]


@dataclass
class IndexerReport:
    """Of one layer, summed over sampled queries that see more than top-k tokens, and their number: the indexer's KL,
    and the attention mass inside its top-k.
    """

    kl: Tensor
    mass: Tensor
    queries: int


def fake_fp8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x rounded to e4m3 with power-of-two scales over blocks of 128 in the last `len(dims)` dims; gradient 1."""
    with torch.no_grad():
        shape = x.shape
        padded = F.pad(x.float(), [p for d in reversed(shape[-len(dims) :]) for p in (0, -d % 128)])
        blocks = padded.unflatten(-1, (-1, 128))
        if len(dims) == 2:
            blocks = blocks.unflatten(-3, (-1, 128))
            amax = blocks.abs().amax((-1, -3), keepdim=True)
        else:
            amax = blocks.abs().amax(-1, keepdim=True)
        scale = torch.exp2(torch.ceil(torch.log2(amax.clamp(min=1e-4) / 448.0)))
        rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
        if len(dims) == 2:
            rounded = rounded.flatten(-4, -3)
        rounded = rounded.flatten(-2)
        rounded = rounded[(..., *(slice(d) for d in shape[-len(dims) :]))].to(x.dtype)
    return x + (rounded - x).detach()


class Linear(nn.Linear):
    """Without bias. With `fp8` set, weight and input are rounded as the FP8 checkpoint's will be (straight-through)."""

    fp8 = False
    fp8_input = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fp8:
            return F.linear(x, self.weight)
        return F.linear(fake_fp8(x, (-1,)) if self.fp8_input else x, fake_fp8(self.weight, (-2, -1)))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


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


class Indexer(nn.Module):
    """The lightning indexer. Its inputs are detached by the caller: only its own loss trains it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.dim = config["index_n_heads"], config["index_head_dim"]
        self.rope_dim = config["qk_rope_head_dim"]
        self.wq_b = Linear(config["q_lora_rank"], self.heads * self.dim)
        self.wk = Linear(config["hidden_size"], self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(config["hidden_size"], self.heads, bias=False)

    def queries(self, q_latent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, q_lora_rank] after its norm -> [T, H, D]."""
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        return torch.cat([rope_half(q[..., : self.rope_dim], cos, sin), q[..., self.rope_dim :]], -1)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, hidden] -> [T, D]."""
        k = self.wk(x)
        k = F.layer_norm(k.float(), (self.dim,), self.k_norm.weight, self.k_norm.bias, 1e-6).to(k.dtype)
        return torch.cat([rope_half(k[..., : self.rope_dim], cos, sin), k[..., self.rope_dim :]], -1)

    def gates(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, H] float32."""
        return self.weights_proj(x).float() * (self.heads**-0.5 * self.dim**-0.5)


def index_scores(q: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """q [Q, H, D], gates [Q, H] float32, keys [S, D] -> [Q, S] float32 = sum_h gate * relu(q . k)."""
    products = F.relu(torch.matmul(q.flatten(0, 1), keys.t())).unflatten(0, q.shape[:2])  # [Q, H, S]
    return torch.matmul(gates.to(products.dtype)[:, None], products)[:, 0].float()


def causal_mask(rows: Tensor, num_keys: int) -> Tensor:
    """rows [Q] positions -> [Q, num_keys] bool, True where visible."""
    return torch.arange(num_keys, device=rows.device) <= rows[:, None]


class Attention(nn.Module):
    """MLA in its multi-head form (keys and values expanded from the latent)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.nope, self.rope, self.v = (
            config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"],
        )  # fmt: skip
        self.latent, self.topk = config["kv_lora_rank"], config["index_topk"]
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
        index_q, gates, index_k = (t.detach() for t in index)
        short = 0  # the documents at the front that the selection leaves whole
        while short < len(docs.spans) and docs.spans[short][1] - docs.spans[short][0] <= self.topk:
            short += 1
        pieces: list[Tensor] = []
        end = docs.spans[short - 1][1] if short else 0
        if short:
            front = Documents(docs.positions[:end], docs.cu_seqlens[: short + 1], self.topk, docs.spans[:short])
            pieces.append(self.dense(q[:end], k[:end], v[:end], front))
        for start, end in docs.spans[short:]:
            heads = [t[None, start:end].transpose(1, 2) for t in (q, k, v)]
            mask = self.selection(index_q[start:end], gates[start:end], index_k[start:end])
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
            # cuDNN would plan anew for every length
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                out = F.scaled_dot_product_attention(*heads, attn_mask=bias[None, None], scale=self.scale)
            pieces.append(out[0].transpose(0, 1))
        return torch.cat([*pieces, v.new_zeros(q.shape[0] - end, *v.shape[1:])])

    @torch.no_grad()
    def selection(self, index_q: Tensor, gates: Tensor, index_k: Tensor) -> Tensor:
        """One document: the top-k of each of its S queries as a causal mask [S, S]."""
        length = index_k.shape[0]
        rows = torch.arange(length, device=index_k.device)
        mask = torch.zeros(length, length, dtype=torch.bool, device=index_k.device)
        step = max(1, (256 << 20) // (length * index_q.shape[1]))
        for first in range(0, length, step):
            last = min(first + step, length)
            visible = causal_mask(rows[first:last], last)
            scores = index_scores(index_q[first:last], gates[first:last], index_k[:last])
            chosen = scores.masked_fill(~visible, float("-inf")).topk(min(self.topk, last), dim=-1).indices
            mask[first:last, :last].scatter_(1, chosen, True).logical_and_(visible)
        return mask

    def indexer_loss(
        self, q: Tensor, k: Tensor, index: tuple[Tensor, Tensor, Tensor], docs: Documents, per_doc: int, *, sparse: bool
    ) -> IndexerReport:
        """KL(attention summed over heads, L1-normalised || softmax of index scores) at sampled queries.

        per_doc  queries sampled of each document that is longer than top-k
        sparse   restrict both distributions to the selected set, as in the sparse stage
        """
        q, k = q.detach(), k.detach()
        index_q, gates, index_k = index
        kl, mass = q.new_zeros((), dtype=torch.float32), q.new_zeros((), dtype=torch.float32)
        queries = 0
        for start, end in docs.spans:
            length = end - start
            first = self.topk
            if length < first + 16:
                continue
            count = min(per_doc, length - first)
            rows = (torch.rand(count, device=q.device) * (length - first)).long() + first
            visible = causal_mask(rows, length)
            logits = torch.einsum("qhd,khd->hqk", q[start + rows], k[start:end]).float() * self.scale
            target = logits.masked_fill(~visible, float("-inf")).softmax(-1).mean(0)
            scores = index_scores(index_q[start + rows], gates[start + rows], index_k[start:end])
            scores = scores.masked_fill(~visible, float("-inf"))
            chosen = torch.zeros_like(visible).scatter_(1, scores.topk(self.topk, -1).indices, True) & visible
            mass = mass + (target * chosen).sum()
            if sparse:
                scores = scores.masked_fill(~chosen, float("-inf"))
                target = target * chosen
                target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
            log_q = scores.log_softmax(-1).masked_fill(target <= 0, 0.0)
            kl = kl + (torch.xlogy(target, target) - target * log_q).sum()
            queries += count
        return IndexerReport(kl, mass, queries)


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden, width), Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Sigmoid router limited to groups, bias-balanced, and all experts as one masked MLP."""

    e_score_correction_bias: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.experts, self.width = config["n_routed_experts"], config["moe_intermediate_size"]
        self.groups, self.topk_group = config["n_group"], config["topk_group"]
        self.top_k, self.factor = config["num_experts_per_tok"], config["routed_scaling_factor"]
        hidden = config["hidden_size"]
        self.gate = nn.Parameter(torch.empty(self.experts, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.experts))
        self.gate_proj = nn.Parameter(torch.empty(self.experts, self.width, hidden))
        self.up_proj = nn.Parameter(torch.empty(self.experts, self.width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.experts, hidden, self.width))
        self.shared_experts = Mlp(hidden, self.width * config["n_shared_experts"])
        self.fp8 = False

    def route(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, E] float32 weights, 0 where not chosen."""
        with torch.autocast(x.device.type, enabled=False):
            p = torch.sigmoid(F.linear(x.float(), self.gate))
        with torch.no_grad():
            choice = p + self.e_score_correction_bias
            grouped = choice.unflatten(-1, (self.groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter_(
                -1, best.topk(self.topk_group, -1).indices, True
            )  # [T, G]
            choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
            chosen = torch.zeros_like(choice).scatter_(-1, choice.topk(self.top_k, -1).indices, 1.0)
        weights = p * chosen
        return weights / weights.sum(-1, keepdim=True) * self.factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden] -> [T, hidden], and the tokens each expert took [E]."""
        weights = self.route(x)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        y = x
        if self.fp8:
            gate, up, down = (fake_fp8(w, (-2, -1)) for w in (gate, up, down))
            y = fake_fp8(x, (-1,))
        h = F.silu(F.linear(y, gate.flatten(0, 1))) * F.linear(y, up.flatten(0, 1))
        h = h.unflatten(-1, (self.experts, self.width))
        if self.fp8:
            h = fake_fp8(h, (-1,))
        h = (h * weights[..., None].to(h.dtype)).flatten(-2)
        out = F.linear(h, down.transpose(0, 1).flatten(1))
        return out + self.shared_experts(x), (weights.detach() > 0).float().sum(0)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], *, moe: bool) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MoE(config) if moe else Mlp(hidden, config["intermediate_size"])
        self.moe = moe

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Residual [T, hidden] -> q, k, v, q latent, normed x."""
        normed = self.input_layernorm(x)
        return (*self.self_attn.qkv(normed, cos, sin), normed)

    def after(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """Residual and [T, H, v] -> the next residual, and the router's load or None."""
        x = x + self.self_attn.o_proj(attended.flatten(1))
        normed = self.post_attention_layernorm(x)
        if self.moe:
            out, load = self.mlp(normed)
            return x + out, load
        return x + self.mlp(normed), None

    def index(self, q_latent: Tensor, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries, gates and keys of detached inputs."""
        q_latent, normed = q_latent.detach(), normed.detach()
        indexer = self.self_attn.indexer
        return indexer.queries(q_latent, cos, sin), indexer.gates(normed), indexer.keys(normed, cos, sin)


class MtpLayer(nn.Module):
    """At position p: the final hidden state of p and the embedding of token p + 1 -> hidden state for token p + 2."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = Layer(config, moe=True)
        self.norm = RMSNorm(hidden, eps)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))


@dataclass
class Output:
    """hidden, mtp_hidden [T, hidden] after their final norms; the router loads by MoE layer; indexer reports."""

    hidden: Tensor
    mtp_hidden: Tensor | None
    loads: list[Tensor]
    reports: list[IndexerReport]


class TinyModel(nn.Module):
    """See the module's docstring. mode "dense" or "sparse" says which attention runs."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(
            Layer(config, moe=i >= config["first_k_dense_replace"]) for i in range(config["num_hidden_layers"])
        )
        self.norm = RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.mtp = MtpLayer(config)
        scaling = config["rope_scaling"]
        cos, sin = yarn_table(
            config["max_position_embeddings"], config["qk_rope_head_dim"], config["rope_theta"],
            factor=scaling["factor"], original_max_positions=scaling["original_max_position_embeddings"],
            beta_fast=scaling["beta_fast"], beta_slow=scaling["beta_slow"], mscale=scaling["mscale"],
            mscale_all_dim=scaling["mscale_all_dim"],
        )  # fmt: skip
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.before: Any = Layer.before
        self.after: Any = Layer.after
        self.index: Any = Layer.index

    def compile(self) -> None:  # type: ignore[override]
        """Compile what lies between the attention calls; one graph serves all layers of a kind."""
        torch._dynamo.config.cache_size_limit = 64
        self.before, self.after, self.index = (
            torch.compile(f, dynamic=False) for f in (Layer.before, Layer.after, Layer.index)
        )

    def init_weights(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * len(self.layers)) ** -0.5
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() < 2:
                    continue
                std = p.shape[-1] ** -0.5
                if name.startswith("embed_tokens"):
                    std = 0.5
                elif name.startswith("lm_head"):
                    std *= 0.5
                elif "o_proj" in name or "down_proj" in name:
                    std *= depth
                p.copy_(torch.randn(p.shape, generator=generator) * std)

    def set_fp8(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Linear | MoE):
                module.fp8 = on

    def forward(
        self, ids: Tensor, docs: Documents, *, mtp: bool = True, mode: str = "dense", index_queries: int = 0
    ) -> Output:
        """ids [T] int64 -> hidden states.

        index_queries  queries a document whose indexer loss is computed (0: none)
        """
        cos, sin = self.cos[docs.positions], self.sin[docs.positions]
        embedded = self.embed_tokens(ids)
        loads: list[Tensor] = []
        reports: list[IndexerReport] = []
        x = embedded.float()
        for layer in self.layers:
            x = self._layer(layer, x, cos, sin, docs, mode, index_queries, loads, reports)
        hidden = self.norm(x)
        if not mtp:
            return Output(hidden, None, loads, reports)
        following = torch.roll(embedded, -1, 0)  # a document's last token gets a wrong one; nothing is asked there
        x = self.mtp.join(hidden, following).float()
        x = self._layer(self.mtp.layer, x, cos, sin, docs, mode, index_queries, loads, reports)
        return Output(hidden, self.mtp.norm(x), loads, reports)

    def _layer(
        self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, docs: Documents, mode: str, index_queries: int,
        loads: list[Tensor], reports: list[IndexerReport],
    ) -> Tensor:  # fmt: skip
        q, k, v, q_latent, normed = self.before(layer, x, cos, sin)
        attn = layer.self_attn
        index = None
        if mode == "sparse" or index_queries:
            index = self.index(layer, q_latent, normed, cos, sin)
        if index_queries:
            reports.append(attn.indexer_loss(q, k, index, docs, index_queries, sparse=mode == "sparse"))
        attended = attn.sparse(q, k, v, index, docs) if mode == "sparse" else attn.dense(q, k, v, docs)
        x, load = self.after(layer, x, attended)
        if load is not None:
            loads.append(load)
        return x

    def moe_layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    @torch.no_grad()
    def balance(self, loads: list[Tensor], speed: float) -> None:
        """Raise the bias of experts that took fewer tokens than the mean, lower the others'."""
        for moe, load in zip(self.moe_layers(), loads):
            moe.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def packed(lengths: list[int], device: torch.device | str = "cpu") -> Documents:
    """Documents of the given lengths, end to end."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    positions = torch.cat([torch.arange(n) for n in lengths])
    spans = list(pairwise(starts))
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    return Documents(positions.to(device), cu, max(lengths), spans)
