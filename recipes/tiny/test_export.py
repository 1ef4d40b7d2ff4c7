"""The exported checkpoint computes what the training model computes, in baleen and in transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baleen.attention.backend import make_backend
from baleen.attention.batch import ForwardBatch
from baleen.config import ModelConfig
from baleen.model.deepseek_v32 import DeepseekV32ForCausalLM
from baleen.model.layers import Precision
from baleen.model.quant import convert_to_fp8
from baleen.model.weights import load_weights
from recipes.tiny.documents import packed
from recipes.tiny.export import SHARD_BYTES, export_fp8, load, read_config, save
from recipes.tiny.layers import Linear, fake_fp8
from recipes.tiny.model import MICRO, TinyModel

LENGTH = 150  # more than MICRO's top-k of 64


@pytest.fixture(scope="module")
def trained() -> TinyModel:
    """Random weights, none of them at a neutral value."""
    model = TinyModel(MICRO)
    model.init_weights(1)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in [*model.parameters(), *(m.e_score_correction_bias for m in model.moe_layers())]:
            if p.dim() == 1:
                p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def exported(trained: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "plain"
    save(trained, folder)
    return folder


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, MICRO["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(2))


def logits_of(model: TinyModel, ids: Tensor, mode: str) -> Tensor:
    with torch.no_grad():
        return model.lm_head(model(ids, packed([len(ids)], MICRO["index_topk"]), mtp=False, mode=mode).hidden)


def baleen_logits(folder: Path, ids: Tensor) -> Tensor:
    config = ModelConfig.from_json(read_config(folder))
    model = DeepseekV32ForCausalLM(config, Precision(torch.float32), 1024)
    assert load_weights(model, folder, progress=False).optional_loaded
    backend = make_backend(
        config, num_pages=8, kv_cache_dtype="float32", index_cache_dtype="float32", prefill="reference",
        decode="reference", dense_prefill_threshold=2048, device=torch.device("cpu"),
    )  # fmt: skip
    positions = torch.arange(len(ids))
    pages = torch.arange(1, 1 + -(-len(ids) // 64))[None]
    batch = ForwardBatch(ids, positions, positions + 64, pages, [len(ids)], [len(ids)], 0)
    with torch.no_grad():
        return model.logits(model(ids, positions, backend, backend.plan(batch)))


def test_baleen_computes_the_same(trained: TinyModel, exported: Path, ids: Tensor) -> None:
    ours = logits_of(trained, ids, "sparse")
    torch.testing.assert_close(baleen_logits(exported, ids), ours, atol=1e-3, rtol=1e-3)
    # the selection matters: dense attention gives other logits past top-k tokens, the same before
    dense = logits_of(trained, ids, "dense")
    torch.testing.assert_close(dense[:64], ours[:64], atol=1e-4, rtol=1e-4)
    assert (dense[64:] - ours[64:]).abs().max() > 1e-2


def test_transformers_computes_the_same(trained: TinyModel, exported: Path, ids: Tensor) -> None:
    from transformers import DeepseekV32ForCausalLM as Oracle

    oracle, info = Oracle.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        expected = oracle(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(trained, ids, "sparse"), expected, atol=1e-3, rtol=1e-3)


def test_packed_documents_do_not_see_each_other(trained: TinyModel, ids: Tensor) -> None:
    for mode in ("dense", "sparse"):
        alone = logits_of(trained, ids[30:], mode)
        with torch.no_grad():
            hidden = trained(ids, packed([30, LENGTH - 30], MICRO["index_topk"]), mtp=False, mode=mode).hidden
        torch.testing.assert_close(trained.lm_head(hidden[30:]), alone, atol=1e-4, rtol=1e-4)


def test_fake_fp8_is_the_fp8_export(trained: TinyModel, ids: Tensor, tmp_path: Path) -> None:
    """Rounding in training is the rounding of the converted checkpoint (index keys aside, so on a short prompt)."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight", ".gate", "weights_proj.weight")):
                p.copy_(p.bfloat16())  # as they are stored
    save(model, tmp_path / "plain")
    convert_to_fp8(tmp_path / "plain", tmp_path / "fp8", shard_bytes=SHARD_BYTES)
    plain = logits_of(model, ids[:60], "dense")
    model.set_fp8(True)
    ours, theirs = logits_of(model, ids[:60], "dense"), baleen_logits(tmp_path / "fp8", ids[:60])

    def error(x: Tensor) -> float:
        """Of the median token: one whose near-equal experts swap places differs more."""
        return ((x - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median().item()

    assert error(ours) < 0.2 * error(plain)


def test_weights_survive_a_round_trip(trained: TinyModel, exported: Path) -> None:
    again = TinyModel(MICRO)
    load(again, exported)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())


def test_fp8_form_loads_back(trained: TinyModel, tmp_path: Path) -> None:
    """Training resumes from the shipped files; rounding them again changes nothing."""
    export_fp8(trained, tmp_path / "fp8")
    again = TinyModel(MICRO)
    load(again, tmp_path / "fp8")
    for name, value in again.state_dict().items():
        original = trained.state_dict()[name]
        assert (value - original).norm() < 0.04 * original.norm(), name
    for module in again.modules():
        if isinstance(module, Linear):
            assert torch.equal(fake_fp8(module.weight.data, (-2, -1)), module.weight.data)
