"""FP8 weights that stay as stored, as on a GPU, against the same ones dequantised at load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from baleen.attention.backend import make_backend
from baleen.attention.batch import ForwardBatch
from baleen.config import ModelConfig
from baleen.kernels.fp8_quant import dequantize_128x128
from baleen.model.deepseek_v32 import DeepseekV32ForCausalLM
from baleen.model.layers import Activation, Linear, Precision
from baleen.model.random_checkpoint import SIZES, official_config, write_random_checkpoint
from baleen.model.weights import WeightError, fill_randomly, load_weights

KEPT = Precision(torch.float32, keep_fp8=True)
CONFIG = {**official_config(num_hidden_layers=2, num_nextn_predict_layers=1, n_routed_experts=8), "index_topk": 32}


def logits(config: ModelConfig, model: DeepseekV32ForCausalLM) -> Tensor:
    backend = make_backend(
        config,
        num_pages=2,
        kv_cache_dtype="float32",
        index_cache_dtype="fp8_e4m3",
        prefill="reference",
        decode="reference",
        dense_prefill_threshold=0,
        device=torch.device("cpu"),
    )
    positions = torch.arange(70)
    batch = ForwardBatch(positions + 5, positions, positions + 64, torch.tensor([[1, 2]]), [70], [70], 0)
    with torch.inference_mode():
        return model.logits(model(batch.ids, batch.positions, backend, backend.plan(batch)))


def test_they_give_the_same_logits(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", CONFIG)
    config = ModelConfig.from_json(CONFIG)
    models = [DeepseekV32ForCausalLM(config, precision, 128) for precision in (Precision(torch.float32), KEPT)]
    reports = [load_weights(model, tmp_path / "model", progress=False) for model in models]
    assert reports[0].num_tensors == reports[1].num_tensors
    assert reports[0].bytes_read == reports[1].bytes_read
    fp8 = sum(p.nbytes for p in models[1].parameters() if p.dtype == torch.float8_e4m3fn)
    linear = sum(p.numel() for name, p in models[0].named_parameters() if p.dim() > 1)
    assert fp8 > 0.65 * linear, "most of the weights are FP8 and take a byte each"
    expected, got = (logits(config, model) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    # Blocks of a random checkpoint have much the same scales; here each has another.
    kept = {target.name: target.dest for target in models[1].checkpoint_tensors()}
    for target in models[0].checkpoint_tensors():
        scale = kept.get(target.name + "_scale_inv")
        if scale is not None:
            scale.mul_(torch.exp2(torch.randint(-1, 2, scale.shape).float()))
            target.dest.copy_(dequantize_128x128(kept[target.name], scale))
    changed, got = (logits(config, model) for model in models)
    torch.testing.assert_close(got, changed, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(changed, expected, rtol=1e-2, atol=1e-2)


def test_blocks_that_parts_share_are_dequantised(tmp_path: Path) -> None:
    """Parts of 64 and experts of 32 columns share a block of 128 with their neighbour, whose scale is another."""
    sizes = official_config(**SIZES["tiny"])
    write_random_checkpoint(tmp_path / "model", sizes)
    config = ModelConfig.from_json(sizes)
    models = [DeepseekV32ForCausalLM(config, precision, 128) for precision in (Precision(torch.float32), KEPT)]
    for model in models:
        load_weights(model, tmp_path / "model", progress=False)
    attention = models[1].layers[0].self_attn
    assert attention.qkv_a.scale is None
    assert attention.o_proj.scale is not None
    expected, got = (logits(config, model) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_plain_checkpoint_cannot_stay_fp8(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", CONFIG, quantized=False)
    model = DeepseekV32ForCausalLM(ModelConfig.from_json(CONFIG), KEPT, 128)
    with pytest.raises(WeightError, match="_scale_inv"):
        load_weights(model, tmp_path / "model", progress=False)


def test_random_fp8_weights_keep_the_size_of_their_input() -> None:
    """And are the seed's."""
    x = torch.randn(64, 512)
    results = []
    for seed in (1, 1, 2):
        model = DeepseekV32ForCausalLM(ModelConfig.from_json(CONFIG), KEPT, 128)
        fill_randomly(model, seed)
        layer = model.layers[0].mlp.down_proj
        assert isinstance(layer, Linear)
        assert layer.weight.dtype == torch.float8_e4m3fn
        results.append(layer(Activation(x[:, : layer.weight.shape[1]])))
        assert 0.5 < float(results[-1].std()) < 2
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
