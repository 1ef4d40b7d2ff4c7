"""Train the bundled model. Stages, in order; each starts from the weights of the one before (`--resume`):

pretrain   dense attention, next-token and MTP loss, indexer untouched; `--spread` keeps the attention concentrated
warmup     only the indexer, towards the dense attention
sparse     attention through the indexer's top-k; the indexer goes on learning, detached
quantize   the FP8 form, and how far its loss is from the plain one's

python -m recipes.tiny.train pretrain --minutes 8 --out OUT [--resume FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.tiny import data
from recipes.tiny.documents import Documents, packed
from recipes.tiny.export import export_fp8, load, save
from recipes.tiny.model import CONFIGS, Output, TinyModel
from recipes.tiny.optimisers import Optimisers

TASK_IDS = {name: i for i, name in enumerate([*data.TASKS, "long"])}
SHORT, LONG = 2048, 16384  # no document of a batch of that kind is longer
PAD = 2


# Batches


@dataclass
class Batch:
    """One packed row of T tokens.

    ids       [T] int64
    at        [N] int64 positions whose next token is trained on; at2: whose next but one is
    task      [N] int64 index into TASK_IDS
    """

    ids: Tensor
    docs: Documents
    at: Tensor
    at2: Tensor
    task: Tensor

    @property
    def targets(self) -> Tensor:
        return self.ids[self.at + 1]

    @property
    def targets2(self) -> Tensor:
        return self.ids[self.at2 + 2]


def pack(rng: random.Random, tokenizer: Any, size: int, kind: str, split: str = "train") -> dict[str, np.ndarray]:
    """Fill a row of `size` tokens with documents, shortest first; what is left at the end is padding.

    kind  "short": the mix of tasks, documents to 2k; "long": look-up, 2k to 16k
    """
    limit = min(size, SHORT if kind == "short" else LONG)
    docs: list[tuple[int, np.ndarray, np.ndarray, int]] = []
    left, misses = size, 0
    tasks, shares = list(data.MIX), list(data.MIX.values())
    while left > 48 and misses < 6:
        if kind == "short":
            task = rng.choices(tasks, shares)[0]
            wish = int(2 ** rng.uniform(6.5, 10.9))
        else:
            task = "needle"
            wish = int(2 ** rng.uniform(11, 13.97))
        wish = min(wish, limit - 32, left)
        conversation = data.document(rng, task, split, wish)
        segments = conversation.segments
        ids: list[int] = []
        mine: list[bool] = []
        for text, trained in segments:
            new = tokenizer.encode(text, add_special_tokens=False).ids
            ids += new
            mine += [trained] * len(new)
        data.measured(conversation, sum(len(text) for text, _ in segments), len(ids))
        if len(ids) > min(left, limit):
            misses += 1
            continue
        misses = 0
        left -= len(ids)
        docs.append((len(ids), np.array(ids, np.int16), np.array(mine), TASK_IDS["long" if kind == "long" else task]))
    while left > 0:
        n = min(left, limit)
        docs.append((n, np.full(n, PAD, np.int16), np.zeros(n, bool), 0))
        left -= n
    docs.sort(key=lambda d: d[0])
    lengths = np.array([d[0] for d in docs], np.int32)
    mine_all = np.concatenate([d[2] for d in docs])
    first = np.zeros(size + 2, bool)  # of a document: never a target of the one before
    first[np.cumsum(lengths)] = True
    first[0] = True
    following = np.append(mine_all[1:], False) & ~first[1 : size + 1]
    second = np.append(mine_all[2:], [False, False]) & ~first[1 : size + 1] & ~first[2 : size + 2]
    at = np.flatnonzero(following).astype(np.int32)
    task_of = np.repeat(np.array([d[3] for d in docs], np.int8), lengths)
    return {
        "ids": np.concatenate([d[1] for d in docs]), "lengths": lengths, "at": at,
        "at2": np.flatnonzero(second).astype(np.int32), "task": task_of[at],
    }  # fmt: skip


def to_batch(row: dict[str, np.ndarray], topk: int, device: torch.device) -> Batch:
    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(torch.int64)

    docs = packed(row["lengths"].tolist(), topk, device)
    return Batch(move(row["ids"]), docs, move(row["at"]), move(row["at2"]), move(row["task"]))


def _worker(number: int, seed: int, size: int, kind: str, out: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from recipes.tiny.tokenizer import load as load_tokenizer

    tokenizer = load_tokenizer()
    rng = random.Random(f"{seed} {number} {kind}")
    while True:
        out.put(pack(rng, tokenizer, size, kind))


class Loader:
    """Batches of both kinds from worker processes; start it before the GPU is touched."""

    def __init__(self, workers: int, seed: int, size: int, long_share: float) -> None:
        context = multiprocessing.get_context("fork")
        long_workers = max(1, round(workers * long_share))
        self.queues = {kind: context.Queue(maxsize=24) for kind in ("short", "long")}
        self.processes = []
        for number in range(max(2, workers)):
            kind = "long" if number < long_workers else "short"
            process = context.Process(target=_worker, args=(number, seed, size, kind, self.queues[kind]), daemon=True)
            process.start()
            self.processes.append(process)
        self.ready: dict[str, queue.Queue[Batch]] = {}

    def start(self, topk: int, device: torch.device) -> None:
        """Begin to move batches to the device, in a thread each."""
        for kind, source in self.queues.items():
            ready: queue.Queue[Batch] = queue.Queue(maxsize=4)
            self.ready[kind] = ready

            def feed(source: Any = source, ready: queue.Queue[Batch] = ready) -> None:
                while True:
                    ready.put(to_batch(source.get(), topk, device))

            threading.Thread(target=feed, daemon=True).start()

    def get(self, kind: str) -> Batch:
        return self.ready[kind].get()

    def close(self) -> None:
        for process in self.processes:
            process.kill()


# Steps


@dataclass
class Args:
    """The command line; see `parse`."""

    stage: str
    out: Path
    resume: Path | None
    config: str
    minutes: float
    max_steps: int
    tokens: int
    short: int
    long: int
    lr: float
    matrix_lr: float
    warm_steps: int
    decay: float
    mtp_weight: float
    index_queries: int
    spread: float
    balance: float
    workers: int
    seed: int
    log_every: int
    compile: bool
    fp8: bool
    keep: Path | None


def token_losses(model: TinyModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [N, hidden], targets [N] -> losses [N] float32, logits [N, vocab]."""
    logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float(), targets, reduction="none"), logits


class Meter:
    """Sums that stay on the device until they are printed."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self) -> dict[str, list[float]]:
        out = {name: value.flatten().tolist() for name, value in self.sums.items()}
        self.sums = {}
        return out


def micro_step(model: TinyModel, batch: Batch, args: Args, weight: float, meter: Meter, *, look: bool) -> list[Tensor]:
    """Forward and backward of one packed row; returns the routers' loads. look: measure MTP's hits too."""
    device = batch.ids.device
    mode = "sparse" if args.stage == "sparse" else "dense"
    spread = args.spread > 0 and args.stage != "warmup"
    indexer = args.stage != "pretrain"
    queries = args.index_queries if indexer or spread else 0
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out: Output = model(batch.ids, batch.docs, mode=mode, queries=queries, indexer=indexer, spread=spread)
        loss = torch.zeros((), device=device)
        if args.stage != "warmup":
            losses, _ = token_losses(model, out.hidden[batch.at], batch.targets)
            assert out.mtp_hidden is not None
            ahead, logits = token_losses(model, out.mtp_hidden[batch.at2], batch.targets2)
            loss = losses.mean() + args.mtp_weight * ahead.mean()
            number = len(TASK_IDS)
            meter.add("loss", torch.zeros(number, device=device).index_add_(0, batch.task, losses.detach()))
            ones = torch.ones_like(losses)
            meter.add("count", torch.zeros(number, device=device).index_add_(0, batch.task, ones))
            meter.add("mtp", torch.stack([ahead.detach().mean(), torch.ones((), device=device)]))
            if look:
                meter.add("mtp_hit", (logits.argmax(-1) == batch.targets2).float().mean())
        reports = [r for r in out.reports if r.queries]
        if reports:
            loss = loss + torch.stack([r.kl / r.queries for r in reports]).mean()
            loss = loss + args.spread * torch.stack([r.spread / r.queries for r in reports]).mean()
            sums = [torch.stack([r.kl, r.spread, r.mass, r.oracle]) / r.queries for r in reports]
            meter.add("index", torch.cat([torch.stack(sums, 1).flatten(), torch.ones(1, device=device)]))
    if loss.requires_grad:
        (loss * weight).backward()
    return out.loads


def train(args: Args, model: TinyModel, loader: Loader, device: torch.device, started: float) -> None:
    optimisers = Optimisers(model, args.stage, args.lr, args.matrix_lr)
    kinds = ["short"] * args.short + ["long"] * args.long
    limit = args.minutes * 60
    meter, step, seen, saved = Meter(), 0, 0, time.monotonic()
    mark, mark_seen = time.monotonic(), 0
    log = (args.out / "log.jsonl").open("a")
    while (elapsed := time.monotonic() - started) < limit and step < args.max_steps:
        loads: list[Tensor] = []
        look = (step + 1) % args.log_every == 0
        for kind in kinds:
            batch = loader.get(kind)
            new = micro_step(model, batch, args, 1 / len(kinds), meter, look=look)
            loads = [a + b for a, b in zip(loads, new)] if loads else new
            seen += len(batch.ids)
        progress = max(elapsed / limit, step / args.max_steps)
        factor = min(1.0, (step + 1) / args.warm_steps)
        if progress > 1 - args.decay:
            factor *= max(0.03, (1 - progress) / args.decay)
        optimisers.step(factor)
        if args.stage != "warmup":
            model.balance(loads, args.balance)
        step += 1
        if look or step == 1:
            sums = meter.take()
            now = time.monotonic()
            line = _line(sums, args, step, seen, elapsed, factor, (seen - mark_seen) / (now - mark), loads)
            mark, mark_seen = now, seen
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(json.dumps(line), flush=True)
        if time.monotonic() - saved > 240:
            checkpoint(model, args)
            saved = time.monotonic()
    log.close()
    checkpoint(model, args)


def _line(
    sums: dict[str, list[float]], args: Args, step: int, seen: int, elapsed: float, factor: float, speed: float,
    loads: list[Tensor],
) -> dict[str, Any]:  # fmt: skip
    line: dict[str, Any] = {
        "stage": args.stage, "step": step, "tokens": seen, "seconds": round(elapsed, 1), "lr": round(factor, 3),
        "tokens_per_second": round(speed),
    }  # fmt: skip
    if "loss" in sums:
        counts = sums["count"]
        line["loss"] = round(sum(sums["loss"]) / max(sum(counts), 1), 4)
        line["by_task"] = {t: round(sums["loss"][i] / counts[i], 4) for t, i in TASK_IDS.items() if counts[i]}
        line["mtp_loss"] = round(sums["mtp"][0] / sums["mtp"][1], 4)
    if "mtp_hit" in sums:
        line["mtp_hit"] = round(sums["mtp_hit"][0] / (args.short + args.long), 4)
    if "index" in sums:
        *values, times = sums["index"]
        layers = len(values) // 4
        for i, name in enumerate(("kl", "spread", "recall", "oracle")):
            line[name] = [round(v / times, 4) for v in values[i * layers : (i + 1) * layers]]
        if args.stage == "pretrain":  # no indexer at work
            del line["kl"], line["recall"]
    if loads:
        line["max_load"] = round(max(float(load.max() / load.mean()) for load in loads), 3)
    return line


def checkpoint(model: TinyModel, args: Args) -> None:
    """bfloat16 shards of at most 16 MiB to --out; float32 ones to --keep, for a run that follows on this machine."""
    save(model, args.out, dtype=torch.bfloat16, copies=False, tokenizer=False)
    if args.keep is not None:
        save(model, args.keep, copies=False, tokenizer=False)


@torch.no_grad()
def mean_loss(model: TinyModel, batches: list[Batch], mode: str) -> float:
    total = count = 0.0
    for batch in batches:
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda):
            hidden = model(batch.ids, batch.docs, mtp=False, mode=mode).hidden
            losses, _ = token_losses(model, hidden[batch.at], batch.targets)
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def held_out(args: Args, topk: int, device: torch.device, count: int) -> Iterator[Batch]:
    from recipes.tiny.tokenizer import load as load_tokenizer

    rng, tokenizer = random.Random(f"held out {args.seed}"), load_tokenizer()
    for i in range(count):
        row = pack(rng, tokenizer, args.tokens, "long" if i % 2 else "short", "test")
        yield to_batch(row, topk, device)


def quantize(args: Args, model: TinyModel, device: torch.device) -> dict[str, float]:
    """Write the FP8 form to --out; returns the loss with it beside the plain one's, selection on."""
    batches = list(held_out(args, model.config["index_topk"], device, 8))
    plain = mean_loss(model, batches, "sparse")
    model.set_fp8(True)
    rounded = mean_loss(model, batches, "sparse")
    model.set_fp8(False)
    export_fp8(model, args.out / "fp8")
    return {"loss": plain, "fp8_loss": rounded, "change": rounded / plain - 1}


def parse() -> Args:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=("pretrain", "warmup", "sparse", "quantize"))
    add("--out", type=Path, required=True, help="weights (bfloat16), log.jsonl")
    add("--keep", type=Path, help="float32 weights, to resume from without loss")
    add("--resume", type=Path, help="folder with weights")
    add("--config", choices=CONFIGS, default="tiny")
    add("--minutes", type=float, default=8.0, help="of training, start included")
    add("--max-steps", type=int, default=1_000_000)
    add("--tokens", type=int, default=65536, help="of one packed row")
    add("--short", type=int, default=3, help="rows of short documents in a step")
    add("--long", type=int, default=1, help="rows of long documents in a step")
    add("--lr", type=float, default=3e-3, help="AdamW: embeddings, head, norms")
    add("--matrix-lr", type=float, default=4e-3, help="Muon: matrices")
    add("--warm-steps", type=int, default=100)
    add("--decay", type=float, default=0.3, help="last share of the time, in which the rate falls to 0.03")
    add("--mtp-weight", type=float, default=0.2)
    add("--index-queries", type=int, default=64, help="queries of each document in the indexer's loss and --spread")
    add("--spread", type=float, default=0.0, help="weight of the loss on attention mass outside the (best) top-k")
    add("--balance", type=float, default=1e-3, help="step of the routers' bias")
    add("--workers", type=int, default=max(2, (os.cpu_count() or 2) - 2))
    add("--seed", type=int, default=0, help="give each run its own")
    add("--log-every", type=int, default=25)
    add("--no-compile", dest="compile", action="store_false", default=torch.cuda.is_available())
    add("--fp8", action="store_true", help="train with FP8 rounding")
    args = parser.parse_args()
    return Args(**vars(args))


def main() -> None:
    started = time.monotonic()
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    training = args.stage in ("pretrain", "warmup", "sparse")
    share = args.long / (args.short + args.long)
    loader = Loader(args.workers, args.seed, args.tokens, share) if training else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TinyModel(CONFIGS[args.config])
    model.init_weights(args.seed)
    if args.resume is not None:
        load(model, args.resume)
    model.to(device)
    if args.compile:
        model.compile()
    if loader is not None:
        loader.start(model.config["index_topk"], device)
        model.set_fp8(args.fp8)
        train(args, model, loader, device, started)
        loader.close()
    if args.stage == "quantize":
        report = quantize(args, model, device)
        (args.out / "quantize.json").write_text(json.dumps(report) + "\n")
        print(json.dumps(report), flush=True)
    print(f"done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
