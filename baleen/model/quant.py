"""The checkpoint formats of the family, and conversions between them.

Official FP8 form: the linear weights of attention, indexer and experts are e4m3 with one float32 `weight_scale_inv`
(the multiplier, whatever its name says) per 128x128 block; norms and biases are float32; embeddings, lm_head, the
router and the indexer's gate are bfloat16. Plain form: every tensor bfloat16 or float32 and no scales, as
`transformers` saves it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from baleen.kernels import fp8_quant
from baleen.model.shards import (
    DTYPES,
    INDEX_NAME,
    ShardReader,
    ShardWriter,
    StoredTensor,
    TensorSpec,
    WeightError,
    new_folder,
    open_checkpoint,
)

BLOCK = 128
SHARD_BYTES = 4 << 30
SCALE_SUFFIX = "_scale_inv"
OFFICIAL_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "scale_fmt": "ue8m0",
}
# How the released checkpoint stores each tensor of the family, by the end of its name.
STORED_DTYPES = {
    "F8_E4M3": re.compile(
        r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|wq_b|wk|gate_proj|up_proj|down_proj)\.weight$"
    ),
    "BF16": re.compile(
        r"(embed_tokens|lm_head|\.mlp\.gate|\.indexer\.weights_proj|\.eh_proj|\.shared_head\.head)\.weight$"
    ),
    "F32": re.compile(r"(norm\.weight|\.k_norm\.bias|\.e_score_correction_bias)$"),
}


def official_dtype(name: str) -> str:
    """F8_E4M3, BF16 or F32: how the official checkpoint stores this tensor. Raises WeightError for an unknown name."""
    for dtype, pattern in STORED_DTYPES.items():
        if pattern.search(name):
            return dtype
    raise WeightError(f"{name} is not a tensor of the DeepSeek-V3.2 family: remove it from the checkpoint")


def official_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """The one or two tensors (weight, scales) as which the official form stores this one."""
    dtype = official_dtype(name)
    specs = [TensorSpec(name, dtype, shape)]
    if dtype == "F8_E4M3":
        specs.append(TensorSpec(scale_name(name), "F32", scale_shape(shape)))
    return specs


def official_tensors(name: str, value: torch.Tensor) -> list[torch.Tensor]:
    """The values of `official_specs(name, value.shape)`, in the same order; scales are powers of two (ue8m0)."""
    dtype = official_dtype(name)
    if dtype != "F8_E4M3":
        return [value.to(DTYPES[dtype])]
    weight, scale = fp8_quant.quantize_128x128(value.float())
    return [weight, scale]


def scale_name(weight_name: str) -> str:
    return weight_name + SCALE_SUFFIX


def scale_shape(weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in weight_shape)


def is_block_fp8(weight: StoredTensor) -> bool:
    return weight.dtype == "F8_E4M3" and len(weight.shape) == 2 and weight.name.endswith(".weight")


def find_scale(weight: StoredTensor, checkpoint: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The block scales of an FP8 weight; None for a float weight.

    Raises: WeightError for scales without an FP8 weight and the reverse, and for scales of a wrong shape or dtype.
    """
    scale = checkpoint.get(scale_name(weight.name))
    if not is_block_fp8(weight):
        if scale is not None:
            raise WeightError(
                f"{scale} is a block scale, but {weight} is not FP8: remove the scale or restore the FP8 weight"
            )
        return None
    if scale is None:
        raise WeightError(
            f"{weight} is FP8 but its scales {scale_name(weight.name)} are missing: download the checkpoint again"
        )
    if scale.dtype != "F32":
        raise WeightError(f"{scale} must be F32: block scales of other dtypes are not read, convert the checkpoint")
    if scale.shape != scale_shape(weight.shape):
        expected = list(scale_shape(weight.shape))
        raise WeightError(
            f"{scale} must be {expected}, one scale per {BLOCK}x{BLOCK} block of {weight}: wrong checkpoint?"
        )
    return scale


def read_scale(reader: ShardReader, scale: StoredTensor) -> torch.Tensor:
    """Block scales, float32. Raises WeightError for a NaN, an infinite or a negative scale."""
    values = reader.read(scale)
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise WeightError(f"{scale} holds a NaN, infinite or negative scale: the file is damaged, download it again")
    return values


def dequantize_rows(rows: torch.Tensor, scale: torch.Tensor, first_row: int) -> torch.Tensor:
    """Dequantise rows of a block-FP8 weight.

    rows       [R, K] float8_e4m3fn, rows first_row..first_row + R of the weight
    scale      [ceil(N/128), ceil(K/128)] float32, of the whole weight
    first_row  a multiple of 128
    returns    [R, K] float32 = rows[i, j] * scale[(first_row + i) // 128, j // 128]
    """
    first_block = first_row // BLOCK
    return fp8_quant.dequantize_128x128(rows, scale[first_block : first_block + scale_shape(rows.shape)[0]])


# Conversions of a checkpoint folder


def convert_to_fp8(source: Path, destination: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Rewrite a plain (bfloat16 or float32) checkpoint in the official FP8 form, tensor by tensor.

    Raises: WeightError for a checkpoint that is quantised already or holds a tensor not of the family; FileExistsError
    when `destination` exists.
    """
    checkpoint = _in_file_order(source)
    for tensor in checkpoint:
        if tensor.dtype not in ("F32", "BF16") or tensor.name.endswith(SCALE_SUFFIX):
            raise WeightError(f"{tensor} is quantised already: give a checkpoint in BF16 or F32")
    layout = [spec for tensor in checkpoint for spec in official_specs(tensor.name, tensor.shape)]
    config = {**_plain_config(source, torch.bfloat16), "quantization_config": OFFICIAL_QUANTIZATION}
    with _converted_folder(source, destination, config) as folder, ShardReader() as reader:
        writer = ShardWriter(folder, layout, shard_bytes)
        for tensor in checkpoint:
            value = reader.read(tensor)
            for spec, part in zip(official_specs(tensor.name, tensor.shape), official_tensors(tensor.name, value)):
                writer.add(spec.name, part)
        writer.finish()


def dequantize_checkpoint(
    source: Path, destination: Path, dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Rewrite an official FP8 checkpoint in the plain form: FP8 and bfloat16 tensors as `dtype`, float32 ones as is.

    Raises: WeightError for a checkpoint without FP8 weights or with bad scales; FileExistsError when `destination`
    exists.
    """
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    if dtype not in names:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    tensors = _in_file_order(source)
    checkpoint = {tensor.name: tensor for tensor in tensors}
    if not any(map(is_block_fp8, tensors)):
        raise WeightError(f"{source} holds no FP8 weight: it needs no dequantising")
    weights = [tensor for tensor in tensors if not tensor.name.endswith(SCALE_SUFFIX)]
    for tensor in tensors:
        if tensor.name.endswith(SCALE_SUFFIX) and tensor.name.removesuffix(SCALE_SUFFIX) not in checkpoint:
            raise WeightError(f"{tensor} has no weight: download the checkpoint again")
    scales = {weight.name: find_scale(weight, checkpoint) for weight in weights}
    layout = [
        TensorSpec(weight.name, "F32" if weight.dtype == "F32" else names[dtype], weight.shape) for weight in weights
    ]
    with _converted_folder(source, destination, _plain_config(source, dtype)) as folder, ShardReader() as reader:
        writer = ShardWriter(folder, layout, shard_bytes)
        for weight, spec in zip(weights, layout):
            scale = scales[weight.name]
            if scale is None:
                value = reader.read(weight)
            else:
                multipliers = read_scale(reader, scale)
                value = dequantize_rows(reader.read(weight), multipliers, 0)
            writer.add(spec.name, value.to(DTYPES[spec.dtype]))
        writer.finish()


def _in_file_order(folder: Path) -> list[StoredTensor]:
    return sorted(open_checkpoint(folder).values(), key=lambda tensor: (tensor.path, tensor.offset))


def _plain_config(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json without quantisation, its weights' dtype under the official key."""
    try:
        config = json.loads((source / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise WeightError(f"{source / 'config.json'} cannot be read: {error}") from error
    for key in ("quantization_config", "dtype"):
        config.pop(key, None)
    return {**config, "torch_dtype": str(dtype).removeprefix("torch.")}


@contextmanager
def _converted_folder(source: Path, destination: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """A new folder with the given config.json and the source's other files (tokenizer, ...), besides its weights."""
    if destination.exists():
        raise FileExistsError(f"{destination} exists: give a folder that does not, or remove it")
    with new_folder(destination) as folder:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name not in (INDEX_NAME, "config.json"):
                shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")
        yield folder
