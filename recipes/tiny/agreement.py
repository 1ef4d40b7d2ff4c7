"""Greedy answers of baleen against `transformers`' logits of the same files, dequantised.

    python -m recipes.tiny.agreement FOLDER --out FILE.json [--items 200]

baleen writes the answers; `transformers` reads prompt and answer in one go. A token that is not its first choice is an
exception, listed with the gap between the two logits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from baleen.llm import LLM
from baleen.messages import SamplingParams
from baleen.model.quant import dequantize_checkpoint
from recipes.tiny.evaluate import MAX_NEW, problems
from recipes.tiny.tokenizer import load as load_tokenizer

SHARES = {"word": 50, "arithmetic": 30, "dates": 20, "copy": 20, "chat": 20, "json": 20, "tools": 20, "needle": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import DeepseekV32ForCausalLM

    with tempfile.TemporaryDirectory() as scratch:  # its own FP8 loader needs accelerate
        plain = Path(scratch) / "plain"
        dequantize_checkpoint(args.folder, plain, torch.float32)
        oracle = DeepseekV32ForCausalLM.from_pretrained(plain, dtype=torch.float32)
    llm = LLM(str(args.folder))
    tokenizer = load_tokenizer()
    exceptions: list[dict[str, Any]] = []
    prompts_read = tokens = 0
    for task, share in SHARES.items():
        conversations, prompts = problems(task, max(1, share * args.items // 200), 1000, 16384)
        sampling = SamplingParams(temperature=0.0, max_new_tokens=MAX_NEW[task])
        for number, (prompt, answer) in enumerate(zip(prompts, llm.generate(prompts, sampling))):
            ids = torch.tensor([[*prompt, *answer.token_ids]])
            with torch.no_grad():
                logits = oracle(ids[:, :-1]).logits[0, len(prompt) - 1 :].float()
            best, chosen = logits.max(-1), ids[0, len(prompt) :]
            written = logits.gather(-1, chosen[:, None])[:, 0]
            for at in (best.indices != chosen).nonzero()[:, 0].tolist():
                exceptions.append({
                    "task": task, "problem": number, "place": at, "gap": round(float(best.values[at] - written[at]), 4),
                    "baleen": tokenizer.decode([int(chosen[at])]),
                    "transformers": tokenizer.decode([int(best.indices[at])]),
                })  # fmt: skip
                print(exceptions[-1], flush=True)
            prompts_read += 1
            tokens += len(answer.token_ids)
        print(f"{task}: {len(conversations)} prompts", flush=True)
    llm.close()
    report = {"prompts": prompts_read, "tokens": tokens, "exceptions": exceptions}
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"{prompts_read} prompts, {tokens} tokens, {len(exceptions)} exceptions")


if __name__ == "__main__":
    main()
