"""The network for training: DeepSeek-V3.2 in plain PyTorch over packed documents.

A batch is one row of T tokens, documents end to end; attention stays inside a document. Everything between the
attention calls has a fixed shape and compiles. All experts are computed for all tokens and weighted by the router
(0 where not chosen): at this size that is one wide MLP, faster than any dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baleen.kernels.rope import yarn_table
from recipes.tiny.attention import Attention, Report
from recipes.tiny.documents import Documents
from recipes.tiny.layers import Linear, RMSNorm, fake_fp8

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
        self.fp8, self.fp8_weight = False, True

    def route(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, E] float32 weights, 0 where not chosen."""
        with torch.autocast(x.device.type, enabled=False):
            # the checkpoint stores it in bfloat16
            gate = self.gate + (self.gate.bfloat16() - self.gate).detach() if self.fp8 else self.gate
            p = torch.sigmoid(F.linear(x.float(), gate))
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
            y = fake_fp8(x, (-1,))
            if self.fp8_weight:
                gate, up, down = (fake_fp8(w, (-2, -1)) for w in (gate, up, down))
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
    reports: list[Report]


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

    def set_fp8(self, on: bool, *, weights: bool = True) -> None:
        """Round as the FP8 checkpoint does; weights: not only the inputs (those of an FP8 checkpoint are round)."""
        for module in self.modules():
            if isinstance(module, Linear | MoE):
                module.fp8, module.fp8_weight = on, weights

    def forward(
        self, ids: Tensor, docs: Documents, *, mtp: bool = True, mode: str = "dense", queries: int = 0,
        indexer: bool = True, spread: bool = False,
    ) -> Output:  # fmt: skip
        """ids [T] int64 -> hidden states.

        queries          of each long document, at which every layer is looked at (0: none); see `Attention.look`
        indexer, spread  what the look is for
        """
        cos, sin = self.cos[docs.positions], self.sin[docs.positions]
        embedded = self.embed_tokens(ids)
        out = Output(embedded, None, [], [])

        def run(layer: Any, x: Tensor) -> Tensor:
            q, k, v, q_latent, normed = self.before(layer, x, cos, sin)
            attn = layer.self_attn
            index = None
            if mode == "sparse" or (queries and indexer):
                index = self.index(layer, q_latent, normed, cos, sin)
            if queries:
                out.reports.append(attn.look(q, k, index if indexer else None, docs, queries, spread=spread))
            attended = attn.sparse(q, k, v, index, docs) if mode == "sparse" else attn.dense(q, k, v, docs)
            x, load = self.after(layer, x, attended)
            if load is not None:
                out.loads.append(load)
            return x

        x = embedded.float()
        for layer in self.layers:
            x = run(layer, x)
        out.hidden = self.norm(x)
        if mtp:
            # a document's last token gets a wrong one to follow; nothing is asked there
            following = torch.roll(embedded, -1, 0)
            x = run(self.mtp.layer, self.mtp.join(out.hidden, following).float())
            out.mtp_hidden = self.mtp.norm(x)
        return out

    def moe_layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    @torch.no_grad()
    def balance(self, loads: list[Tensor], speed: float) -> None:
        """Raise the bias of experts that took fewer tokens than the mean, lower the others'."""
        for moe, load in zip(self.moe_layers(), loads):
            moe.e_score_correction_bias += speed * torch.sign(load.mean() - load)
