"""Greedy answers of the training model to held-out problems, many at once, in plain PyTorch."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.tiny import data
from recipes.tiny.model import Layer, TinyModel, packed

EOS_ID, PAD_ID = 1, 2
NEEDLE_LENGTHS = (1000, 2000, 4000, 8000, 15500)
MAX_NEW = {
    "arithmetic": 400,
    "word": 480,
    "dates": 256,
    "copy": 320,
    "chat": 80,
    "json": 240,
    "tools": 320,
    "needle": 192,
}


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
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        caches = [Cache(model, rows, length, device, dtype) for _ in model.layers]
        last = torch.cat([_prefill(model, caches, row, ids, mode, device) for row, ids in enumerate(prompts)])
        ids = model.lm_head(last).argmax(-1)
        at = torch.tensor([len(p) for p in prompts], device=device)
        out = torch.full((rows, max_new), EOS_ID, device=device)
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        for step in range(max_new):
            out[:, step] = torch.where(done, EOS_ID, ids)
            done |= (ids == EOS_ID) | (at >= length - 1)
            if step % 16 == 15 and bool(done.all()):
                break
            ids = _decode(model, caches, ids, at.clamp(max=length - 1), mode)
            at = at + 1
    texts = []
    for row in out.tolist():
        texts.append(row[: row.index(EOS_ID)] if EOS_ID in row else row)
    return texts


def _prefill(
    model: TinyModel, caches: list[Cache], row: int, ids: list[int], mode: str, device: torch.device
) -> Tensor:
    """One prompt; returns its last hidden state [1, hidden]."""
    n = len(ids)
    docs = packed([n], device)
    cos, sin = model.cos[:n], model.sin[:n]
    x = model.embed_tokens(torch.tensor(ids, device=device)).float()
    for layer, cache in zip(model.layers, caches):
        q, k, v, q_latent, normed = Layer.before(layer, x, cos, sin)
        cache.k[row, :, :n], cache.v[row, :, :n] = k.transpose(0, 1), v.transpose(0, 1)
        attn = layer.self_attn
        if mode == "sparse":
            index = Layer.index(layer, q_latent, normed, cos, sin)
            cache.index_k[row, :n] = index[2]
            attended = attn.sparse(q, k, v, index, docs)
        else:
            attended = attn.dense(q, k, v, docs)
        x, _ = Layer.after(layer, x, attended)
    return model.norm(x[-1:])


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
            scores = torch.matmul(gates.to(products.dtype)[:, None], products)[:, 0].float()
            chosen = scores.masked_fill(~visible, float("-inf")).topk(min(attn.topk, length), -1).indices
            mask = torch.zeros_like(visible).scatter_(1, chosen, True) & visible
        logits = torch.matmul(cache.k, q.to(cache.k.dtype)[..., None])[..., 0].float() * attn.scale
        weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1).to(cache.v.dtype)
        x, _ = Layer.after(layer, x, torch.matmul(weights[:, :, None], cache.v)[:, :, 0])
    return model.lm_head(model.norm(x)).argmax(-1)


def evaluate(model: TinyModel, items: int, mode: str, *, lengths: tuple[int, ...] = NEEDLE_LENGTHS) -> dict[str, Any]:
    """Accuracy of each task, and of look-up by length, on held-out problems; some wrong answers as examples."""
    from recipes.tiny.tokenizer import load

    tokenizer = load()
    runs = [(task, task, 400) for task in data.TASKS if task != "needle"]
    runs += [(f"needle {length}", "needle", length) for length in lengths]
    report: dict[str, Any] = {}
    for name, task, length in runs:
        started = time.monotonic()
        rng = random.Random(f"test {name}")
        count = items if length < 4000 else max(1, items // 3)
        problems, prompts = [], []
        while len(problems) < count:
            conversation = data.document(rng, task, "test", length)
            ids = tokenizer.encode(conversation.prompt, add_special_tokens=False).ids
            data.measured(conversation, len(conversation.prompt), len(ids))
            if len(ids) + 64 > model.config["max_position_embeddings"]:
                continue
            problems.append(conversation)
            prompts.append(ids)
        answers = generate(model, prompts, MAX_NEW[task], mode)
        right, wrong = 0, []
        for conversation, answer in zip(problems, answers):
            text = tokenizer.decode(answer, skip_special_tokens=False)
            if data.score(conversation, text):
                right += 1
            elif len(wrong) < 4:
                wrong.append(
                    {"asked": conversation.prompt[-300:], "got": text[:600], "wanted": str(conversation.answer)}
                )
        report[name] = {
            "accuracy": round(right / count, 4), "items": count, "mode": mode,
            "mean_prompt_tokens": round(sum(map(len, prompts)) / count),
            "seconds": round(time.monotonic() - started, 1), "wrong": wrong,
        }  # fmt: skip
        print(f"{name}: {right}/{count} ({report[name]['seconds']} s)", flush=True)
    return report
