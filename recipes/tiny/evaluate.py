"""Held-out problems on a checkpoint folder, in plain PyTorch.

    python -m recipes.tiny.evaluate FOLDER --out FILE.json [--fp8] [--items 200] [--modes sparse dense ...]

sparse   the indexer's top-k          dense    all tokens
random   any top-k tokens instead
layout   the indexer with the main attention's rope layout: a head's last dims, pairs side by side
pairs    of that only the pairs: the right dims, the wrong partners
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.tiny import data
from recipes.tiny.attention import rope_index, rope_interleaved
from recipes.tiny.data.needle import needle_at
from recipes.tiny.documents import packed
from recipes.tiny.export import load, read_config
from recipes.tiny.generate import generate
from recipes.tiny.model import Layer, TinyModel
from recipes.tiny.tokenizer import load as load_tokenizer

LENGTHS = (1000, 2000, 4000, 8000, 15500)
DEPTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
MAX_NEW = {
    "arithmetic": 400, "word": 480, "dates": 256, "copy": 320, "chat": 80, "json": 240, "tools": 320, "needle": 192,
}  # fmt: skip
EOS_ID = 1
MODES = ("sparse", "dense", "random", "layout", "pairs")


def rope_layout(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A layout that no indexer has: rope comes last and pairs lie side by side, as in the main attention."""
    size = 2 * cos.shape[-1]
    return torch.cat([x[..., :-size], rope_interleaved(x[..., -size:], cos, sin)], -1)


def rope_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The indexer's dims with the main attention's pairs."""
    size = 2 * cos.shape[-1]
    return torch.cat([rope_interleaved(x[..., :size], cos, sin), x[..., size:]], -1)


WRONG_ROPE = {"layout": rope_layout, "pairs": rope_pairs}


def set_mode(model: TinyModel, mode: str) -> str:
    """Prepare an ablation; returns the attention that runs."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.self_attn.random = mode == "random"
            module.self_attn.indexer.rope = WRONG_ROPE.get(mode, rope_index)
    return "dense" if mode == "dense" else "sparse"


@functools.cache
def problems(task: str, count: int, length: int, limit: int) -> tuple[list[data.Conversation], list[list[int]]]:
    """Held-out conversations of a task and their prompts' ids, the same for every mode."""
    tokenizer = load_tokenizer()
    rng = random.Random(f"test {task} {length}")
    found: list[data.Conversation] = []
    prompts: list[list[int]] = []
    while len(found) < count:
        conversation = data.document(rng, task, "test", length)
        ids = tokenizer.encode(conversation.prompt, add_special_tokens=False).ids
        data.measured(conversation, len(conversation.prompt), len(ids))
        if len(ids) + 64 <= limit:
            found.append(conversation)
            prompts.append(ids)
    return found, prompts


def accuracy(model: TinyModel, task: str, count: int, length: int, mode: str) -> dict[str, Any]:
    """Share of right answers with its 95 % interval (Wilson); some wrong ones as examples."""
    started = time.monotonic()
    conversations, prompts = problems(task, count, length, model.config["max_position_embeddings"])
    tokenizer = load_tokenizer()
    answers = generate(model, prompts, MAX_NEW[task], set_mode(model, mode))
    texts = [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
    right = [data.score(*pair) for pair in zip(conversations, texts)]
    wrong = [
        {"asked": c.prompt[-300:], "got": text[-500:], "wanted": str(c.answer)}
        for c, text, ok in zip(conversations, texts, right) if not ok
    ]  # fmt: skip
    report: dict[str, Any] = {
        "accuracy": round(sum(right) / count, 4), "interval": interval(sum(right), count), "items": count,
        "mean_prompt_tokens": round(sum(map(len, prompts)) / count),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    if task == "json":
        report["valid"] = round(sum(data.is_valid_json(*pair) for pair in zip(conversations, texts)) / count, 4)
    return {**report, "wrong": wrong[:6]}


def interval(right: int, count: int) -> list[float]:
    """95 % (Wilson)."""
    z, p = 1.96, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * ((p * (1 - p) + z * z / (4 * count)) / count) ** 0.5 / (1 + z * z / count)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def depth_grid(model: TinyModel, count: int, mode: str) -> list[list[float]]:
    """Accuracy of one needle by length and depth, [len(LENGTHS)][len(DEPTHS)]."""
    tokenizer = load_tokenizer()
    probe = needle_at(random.Random(0), "test", 4000, 0.5).prompt
    characters = len(probe) / len(tokenizer.encode(probe).ids)
    grid = []
    for length in LENGTHS:
        rng = random.Random(f"depth {length}")
        asked = [needle_at(rng, "test", int(length * characters), depth) for depth in DEPTHS for _ in range(count)]
        prompts = [tokenizer.encode(c.prompt, add_special_tokens=False).ids for c in asked]
        answers = generate(model, prompts, 64, set_mode(model, mode))
        right = [data.score(c, tokenizer.decode(a, skip_special_tokens=False)) for c, a in zip(asked, answers)]
        row = [sum(right[i * count : (i + 1) * count]) / count for i in range(len(DEPTHS))]
        print(f"{mode} {length} ({min(map(len, prompts))}-{max(map(len, prompts))} tokens): {row}", flush=True)
        grid.append([round(value, 3) for value in row])
    return grid


@torch.no_grad()
def recall(model: TinyModel, length: int, count: int, mode: str = "sparse") -> dict[str, Any]:
    """By layer, MTP last: share of the attention mass inside the indexer's top-k and inside the best top-k, at queries
    anywhere past top-k in held-out look-up texts.
    """
    set_mode(model, mode)
    _, prompts = problems("needle", count, length, model.config["max_position_embeddings"])
    device = model.embed_tokens.weight.device
    total = torch.zeros(2, len(model.layers) + 1, device=device)
    for ids in prompts:
        docs = packed([len(ids)], model.config["index_topk"], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model(torch.tensor(ids, device=device), docs, mode="sparse", queries=512)
        total += torch.tensor([[float(r.mass) / r.queries, float(r.oracle) / r.queries] for r in out.reports]).T.to(
            device
        )
    indexer, best = (total / count).tolist()
    tokens = round(sum(map(len, prompts)) / count)
    return {
        "tokens": tokens, "texts": count, "indexer": [round(v, 4) for v in indexer], "best": [round(v, 4) for v in best]
    }  # fmt: skip


@torch.no_grad()
def mtp_acceptance(model: TinyModel, count: int, drafts: int = 3) -> dict[str, Any]:
    """Of greedy answers to word problems: how often each of `drafts` chained drafts is the token that the model itself
    writes, and the tokens a step of speculative decoding yields.

    The MTP layer reads the model's final hidden state (normed) for the first draft and its own normed output for the
    next ones; its keys of tokens already accepted are those of the true hidden states.
    """
    set_mode(model, "dense")  # hardly a text here is longer than top-k
    _, prompts = problems("word", count, 400, 1024)
    answers = generate(model, prompts, MAX_NEW["word"], "dense")
    hits = [0] * drafts
    places = steps = tokens = 0
    for prompt, answer in zip(prompts, answers):
        right = _drafts(model, [*prompt, *answer, EOS_ID], drafts)[:, len(prompt) - 1 :]  # [drafts, P]
        chain = right.cumprod(0)
        places += chain.shape[1] - drafts
        for i in range(drafts):
            hits[i] += int(chain[i, : chain.shape[1] - drafts].sum())
        at, accepted = 0, chain.sum(0).tolist()
        while at < len(accepted):
            tokens += int(accepted[at]) + 1
            steps += 1
            at += int(accepted[at]) + 1
    return {
        "first_draft": round(hits[0] / places, 4), "chain": [round(h / places, 4) for h in hits],
        "tokens_per_step": round(tokens / steps, 4), "problems": count, "places": places,
    }  # fmt: skip


def _drafts(model: TinyModel, ids: list[int], drafts: int) -> Tensor:
    """[drafts, P] 0 or 1: at each place p, with token p + 1 known, is draft d the true token p + 2 + d? The drafts
    before it count as right: only the chain's product means anything. 0 past the end.
    """
    device = model.embed_tokens.weight.device
    number = len(ids)
    tokens = torch.tensor(ids, device=device)
    docs = packed([number], model.config["index_topk"], device)
    layer = model.mtp.layer
    attn = layer.self_attn
    places = torch.arange(number, device=device)
    right = torch.zeros(drafts, number - 1, device=device, dtype=torch.int64)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        state = model(tokens, docs, mtp=False).hidden
        known: tuple[Tensor, Tensor] | None = None  # the layer's keys and values of true states
        own: list[tuple[Tensor, Tensor]] = []  # those of the drafts
        for d in range(drafts):
            following = model.embed_tokens(tokens[(places + 1 + d).clamp(max=number - 1)])
            x = model.mtp.join(state, following).float()
            at = (places + d).clamp(max=len(model.cos) - 1)
            q, k, v, _, _ = Layer.before(layer, x, model.cos[at], model.sin[at])
            if known is None:
                known = (k, v)
            else:
                own.append((k, v))
            logits = torch.einsum("qhd,khd->hqk", q.float(), known[0].float()) * attn.scale
            logits = logits.masked_fill(places > places[:, None], float("-inf"))
            extra = [(q.float() * key.float()).sum(-1).T * attn.scale for key, _ in own]  # [H, P] each
            weights = torch.cat([logits, *(e[..., None] for e in extra)], -1).softmax(-1)
            attended = torch.einsum("hqk,khd->qhd", weights[..., :number], known[1].float())
            for i, (_, value) in enumerate(own):
                attended = attended + weights[..., number + i].T[..., None] * value.float()
            x, _ = Layer.after(layer, x, attended.to(v.dtype))
            state = model.mtp.norm(x)
            guess = model.lm_head(state).argmax(-1)
            end = number - 2 - d
            right[d, :end] = (guess[:end] == tokens[2 + d :]).long()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path)
    add("--out", type=Path, required=True)
    add("--fp8", action="store_true", help="round the inputs of FP8 linears, as the engine does")
    add("--items", type=int, default=200, help="problems of each task and length")
    add("--modes", nargs="*", choices=MODES, default=["sparse"], help="all tasks in sparse and dense, else only needle")
    add("--tasks", nargs="*", choices=data.TASKS, default=list(data.TASKS))
    add("--depth-items", type=int, default=0, help="needles of each length and depth")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TinyModel(read_config(args.folder))
    load(model, args.folder)
    model.to(device).requires_grad_(False)
    model.set_fp8(args.fp8, weights=False)
    report: dict[str, Any] = {}
    for mode in args.modes:
        for task in args.tasks:
            if task != "needle" and mode not in ("sparse", "dense"):
                continue
            for length in LENGTHS if task == "needle" else (400,):
                name = f"needle {length}" if task == "needle" else task
                result = accuracy(model, task, args.items, length, mode)
                report.setdefault(mode, {})[name] = result
                print(mode, name, {k: v for k, v in result.items() if k != "wrong"}, flush=True)
        if mode == "sparse":
            report["recall"] = [recall(model, length, 8) for length in (8000, 15500)]
            report["mtp"] = mtp_acceptance(model, min(args.items, 100))
            print(json.dumps({"recall": report["recall"], "mtp": report["mtp"]}), flush=True)
        elif mode in WRONG_ROPE:
            report[f"recall {mode}"] = [recall(model, length, 8, mode) for length in (8000, 15500)]
            print(report[f"recall {mode}"], flush=True)
        if args.depth_items and mode != "dense":
            grid = depth_grid(model, args.depth_items, mode)
            report.setdefault("depth", {"lengths": LENGTHS, "depths": DEPTHS})[mode] = grid
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
