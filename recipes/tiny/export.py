"""Weights of the training model <-> checkpoint folders with the family's tensor names.

python -m recipes.tiny.export CHECKPOINT FOLDER [--fp8]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baleen.model.quant import convert_to_fp8, dequantize_rows, find_scale
from baleen.model.shards import DTYPES, ShardReader, ShardWriter, TensorSpec, open_checkpoint
from recipes.tiny.model import TinyModel

SHARD_BYTES = 15 << 20
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TOKENIZER = Path(__file__).parent / "tokenizer"


def official_name(name: str, layers: int) -> str:
    """A parameter of `TinyModel` -> its checkpoint name; experts are stacked here and split by `named_weights`."""
    if name.startswith("lm_head."):
        return name
    if name.startswith("mtp."):
        rest = name.removeprefix("mtp.")
        rest = f"shared_head.{rest}" if rest.startswith("norm.") else rest.removeprefix("layer.")
        return f"model.layers.{layers}.{rest}"
    return f"model.{name}"


def named_weights(model: TinyModel) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, float32 tensor; a view where it is a parameter), in the order of the network, MTP's copies of
    embedding and head included.
    """
    layers = len(model.layers)
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in state.items():
        if name in ("cos", "sin"):
            continue
        official = official_name(name, layers)
        if name.endswith((".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")):
            owner, kind = official.rsplit(".", 1)
            for expert in range(value.shape[0]):
                yield f"{owner}.experts.{expert}.{kind}.weight", value.data[expert]
        elif name.endswith("e_score_correction_bias"):
            yield official.replace(".mlp.", ".mlp.gate."), value.data
        else:
            yield official + (".weight" if name.endswith(".gate") else ""), value.data
    yield f"model.layers.{layers}.embed_tokens.weight", model.embed_tokens.weight.data
    yield f"model.layers.{layers}.shared_head.head.weight", model.lm_head.weight.data


def save(
    model: TinyModel, folder: Path, *, dtype: torch.dtype = torch.float32, copies: bool = True, tokenizer: bool = True
) -> None:
    """Write the weights in `dtype` (norms and biases float32), config.json and the tokenizer.

    tokenizer  with the tokenizer's files and generation_config.json
    copies  with MTP's copies of embedding and head, as the released checkpoint has; a training checkpoint needs none
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    tensors = []
    for name, value in named_weights(model):
        if not copies and name.endswith((f"{len(model.layers)}.embed_tokens.weight", "shared_head.head.weight")):
            continue
        tensors.append((name, value.detach().to("cpu", dtype if value.dim() > 1 else torch.float32).contiguous()))
    writer = ShardWriter(
        folder, [TensorSpec(name, NAMES[value.dtype], tuple(value.shape)) for name, value in tensors], SHARD_BYTES
    )
    for name, value in tensors:
        writer.add(name, value)
    writer.finish()
    config = {**model.config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not tokenizer:
        return
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}, indent=2) + "\n"
    )
    if TOKENIZER.exists():
        for file in TOKENIZER.iterdir():
            shutil.copyfile(file, folder / file.name)


@torch.no_grad()
def load(model: TinyModel, folder: Path) -> None:
    """Fill the model from a folder written by `save` or `export_fp8`. Raises KeyError for a tensor that is missing."""
    checkpoint = open_checkpoint(folder)
    with ShardReader() as reader:
        for name, value in named_weights(model):
            if name in checkpoint:
                stored = reader.read(checkpoint[name])
                scale = find_scale(checkpoint[name], checkpoint)
                if scale is not None:
                    stored = dequantize_rows(stored, reader.read(scale), 0)
                value.copy_(stored.to(value.device))
            elif not name.endswith((f"{len(model.layers)}.embed_tokens.weight", "shared_head.head.weight")):
                raise KeyError(name)


def export_fp8(model: TinyModel, folder: Path) -> None:
    """The official FP8 form with tokenizer, as it ships, without MTP's copies of embedding and head. Raises
    FileExistsError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        save(model, Path(scratch) / "plain", copies=False)
        convert_to_fp8(Path(scratch) / "plain", folder, shard_bytes=SHARD_BYTES)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fp8", action="store_true", help="the official FP8 form")
    args = parser.parse_args()
    model = TinyModel(read_config(args.checkpoint))
    load(model, args.checkpoint)
    if not args.fp8:
        save(model, args.folder, dtype=torch.bfloat16)
        return
    export_fp8(model, args.folder)


if __name__ == "__main__":
    main()
