"""Greedy answers of the training model, many at once, in plain PyTorch: packed prefill, decode as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.tiny.documents import packed
from recipes.tiny.model import Layer, TinyModel

EOS_ID = 1
PREFILL_TOKENS = 65536
CACHE_TOKENS = 1 << 20  # rows times length of the caches: 20 GB


class Cache:
    """Keys, values and index keys of one layer for B rows of at most L tokens."""

    def __init__(self, model: TinyModel, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        heads = config["num_attention_heads"]
        qk, value = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
        self.k = torch.zeros(rows, heads, length, qk, device=device, dtype=dtype)
        self.v = torch.zeros(rows, heads, length, value, device=device, dtype=dtype)
        self.index_k = torch.zeros(rows, length, config["index_head_dim"], device=device, dtype=dtype)


@torch.no_grad()
def generate(model: TinyModel, prompts: list[list[int]], max_new: int, mode: str = "dense") -> list[list[int]]:
    """Greedy continuations up to eos (not included) or `max_new` tokens."""
    device = model.embed_tokens.weight.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length = min(max(map(len, prompts)) + max_new, model.config["max_position_embeddings"])
    rows = len(prompts)
    half = rows // 2
    if half and rows * length > CACHE_TOKENS:
        return generate(model, prompts[:half], max_new, mode) + generate(model, prompts[half:], max_new, mode)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        caches = [Cache(model, rows, length, device, dtype) for _ in model.layers]
        ids = torch.zeros(rows, dtype=torch.int64, device=device)
        for some in _chunks(prompts):
            last = _prefill(model, caches, some, [prompts[row] for row in some], mode, device)
            ids[torch.tensor(some, device=device)] = model.lm_head(last).argmax(-1)
        at = torch.tensor([len(p) for p in prompts], device=device)
        out = torch.full((rows, max_new), EOS_ID, device=device)
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        column = torch.zeros(rows, 1, dtype=torch.int64, device=device)

        def step() -> None:
            """Record the rows' tokens and find the next ones; every tensor is changed in place."""
            out.scatter_(1, column, torch.where(done, EOS_ID, ids)[:, None])
            done.logical_or_((ids == EOS_ID) | (at >= length - 1))
            ids.copy_(_decode(model, caches, ids, at.clamp(max=length - 1), mode))
            at.add_(1)
            column.add_(1)

        run: Callable[[], None] = step
        for number in range(max_new):
            if number == 2 and device.type == "cuda":
                run = _captured(step)
            run()
            if number % 16 == 15 and bool(done.all()):
                break
    texts = []
    for row in out.tolist():
        texts.append(row[: row.index(EOS_ID)] if EOS_ID in row else row)
    return texts


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _chunks(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Rows whose prompts are prefilled together, shortest first."""
    some: list[int] = []
    size = 0
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        if some and size + len(prompts[row]) > PREFILL_TOKENS:
            yield some
            some, size = [], 0
        some.append(row)
        size += len(prompts[row])
    yield some


def _prefill(
    model: TinyModel, caches: list[Cache], rows: list[int], prompts: list[list[int]], mode: str, device: torch.device
) -> Tensor:
    """Prompts in rising length; returns their last hidden states [B, hidden]."""
    docs = packed([len(p) for p in prompts], model.config["index_topk"], device)
    cos, sin = model.cos[docs.positions], model.sin[docs.positions]
    x = model.embed_tokens(torch.tensor([i for p in prompts for i in p], device=device)).float()
    for layer, cache in zip(model.layers, caches):
        q, k, v, q_latent, normed = Layer.before(layer, x, cos, sin)
        attn = layer.self_attn
        index = Layer.index(layer, q_latent, normed, cos, sin) if mode == "sparse" else None
        for row, (start, end) in zip(rows, docs.spans):
            cache.k[row, :, : end - start] = k[start:end].transpose(0, 1)
            cache.v[row, :, : end - start] = v[start:end].transpose(0, 1)
            if index is not None:
                cache.index_k[row, : end - start] = index[2][start:end]
        attended = attn.dense(q, k, v, docs) if index is None else attn.sparse(q, k, v, index, docs)
        x, _ = Layer.after(layer, x, attended)
    return model.norm(x[docs.cu_seqlens[1:].long() - 1])


def _decode(model: TinyModel, caches: list[Cache], ids: Tensor, at: Tensor, mode: str) -> Tensor:
    """One token of each row at position `at`; returns the next ones."""
    cos, sin = model.cos[at], model.sin[at]
    rows = torch.arange(len(ids), device=ids.device)
    x = model.embed_tokens(ids).float()
    length = caches[0].k.shape[2]
    visible = torch.arange(length, device=ids.device) <= at[:, None]
    for layer, cache in zip(model.layers, caches):
        q, k, v, q_latent, normed = Layer.before(layer, x, cos, sin)
        cache.k[rows, :, at], cache.v[rows, :, at] = k.to(cache.k.dtype), v.to(cache.v.dtype)
        attn = layer.self_attn
        mask = visible
        if mode == "sparse":
            index_q, gates, index_k = Layer.index(layer, q_latent, normed, cos, sin)
            cache.index_k[rows, at] = index_k.to(cache.index_k.dtype)
            products = F.relu(torch.matmul(index_q.to(cache.index_k.dtype), cache.index_k.transpose(1, 2)))
            scores = torch.matmul(gates[:, None], products.float())[:, 0]
            if attn.random:
                scores = torch.rand_like(scores)
            chosen = scores.masked_fill(~visible, float("-inf")).topk(min(attn.topk, length), -1).indices
            mask = torch.zeros_like(visible).scatter_(1, chosen, True) & visible
        logits = torch.matmul(cache.k, q.to(cache.k.dtype)[..., None])[..., 0].float() * attn.scale
        weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1).to(cache.v.dtype)
        x, _ = Layer.after(layer, x, torch.matmul(weights[:, :, None], cache.v)[:, :, 0])
    return model.lm_head(model.norm(x)).argmax(-1)
