"""Samples of each task, and how fast they are made."""

from __future__ import annotations

import random
import sys
import time

from recipes.tiny.data import TASKS, document
from recipes.tiny.tokenizer import load


def main() -> None:
    tokenizer = load()
    for task in sys.argv[1:] or TASKS:
        rng = random.Random(5)
        for _ in range(2):
            conversation = document(rng, task, "train", 300)
            print(f"--- {task}")
            print("".join(f"\033[1m{text}\033[0m" if mine else text for text, mine in conversation.segments))
        started, tokens, written, count = time.perf_counter(), 0, 0, 0
        while time.perf_counter() - started < 1:
            conversation = document(rng, task, "train", 1000)
            for text, mine in conversation.segments:
                n = len(tokenizer.encode(text, add_special_tokens=False))
                tokens += n
                written += n * mine
            count += 1
        print(f"--- {task}: {tokens:,} tokens/s, {tokens / count:.0f} a document, {written / tokens:.0%} trained on")


if __name__ == "__main__":
    main()
