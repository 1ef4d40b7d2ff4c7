"""What the evaluation measures is what the model does."""

from __future__ import annotations

import pytest
import torch

from recipes.tiny.documents import packed
from recipes.tiny.evaluate import MODES, _drafts, interval, rope_layout, rope_pairs, set_mode
from recipes.tiny.generate import generate
from recipes.tiny.model import MICRO, TinyModel


@pytest.fixture(scope="module")
def model() -> TinyModel:
    model = TinyModel(MICRO)
    model.init_weights(3)
    return model.requires_grad_(False)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, MICRO["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_generate_is_greedy(model: TinyModel, mode: str) -> None:
    prompts = [tokens(150, 0), tokens(40, 1), tokens(90, 2)]  # longer and shorter than top-k
    for prompt, answer in zip(prompts, generate(model, prompts, 5, mode)):
        for n in range(5):
            ids = [*prompt, *answer[:n]]
            docs = packed([len(ids)], MICRO["index_topk"])
            hidden = model(torch.tensor(ids), docs, mtp=False, mode=mode).hidden[-1]
            assert model.lm_head(hidden).argmax().item() == answer[n]


def test_ablations_change_the_selection(model: TinyModel) -> None:
    ids = torch.tensor(tokens(200, 4))
    docs = packed([200], MICRO["index_topk"])
    seen = {}
    for mode in MODES:
        seen[mode] = model(ids, docs, mtp=False, mode=set_mode(model, mode)).hidden
    set_mode(model, "sparse")
    for mode in [mode for mode in MODES if mode != "sparse"]:
        assert (seen[mode][64:] - seen["sparse"][64:]).norm() > 0.01 * seen["sparse"][64:].norm(), mode
        torch.testing.assert_close(seen[mode][:64], seen["sparse"][:64], atol=1e-3, rtol=1e-3)


def test_wrong_ropes_turn_the_pairs_and_dims_that_they_say() -> None:
    g = torch.Generator().manual_seed(0)
    x, angles = torch.randn(3, 2, 10, generator=g), torch.rand(3, 2, generator=g)
    for rope, first in ((rope_layout, 6), (rope_pairs, 0)):
        got = rope(x, angles.cos(), angles.sin())
        expected = x.clone()
        for t in range(3):
            for head in range(2):
                for pair in range(2):
                    at = first + 2 * pair
                    turned = complex(x[t, head, at], x[t, head, at + 1]) * torch.polar(torch.ones(()), angles[t, pair])
                    expected[t, head, at], expected[t, head, at + 1] = turned.real, turned.imag
        torch.testing.assert_close(got, expected)


def test_drafts_follow_the_mtp_layer(model: TinyModel) -> None:
    """Text written by the MTP layer's own chain is accepted whole; changed, it is refused where it was changed."""
    ids = tokens(30, 5)
    docs = packed([30], MICRO["index_topk"])
    first = model.lm_head(model(torch.tensor(ids), docs).mtp_hidden).argmax(-1)  # token p + 2 by place p
    expected = (first[:28] == torch.tensor(ids)[2:]).long()
    assert torch.equal(_drafts(model, ids, 3)[0, :28], expected)
    ids[20] = int(first[18])
    assert _drafts(model, ids, 1)[0, 18] == 1
    ids[20] = (ids[20] + 1) % 4096
    assert _drafts(model, ids, 1)[0, 18] == 0


def test_second_draft_is_a_shifted_mtp_step(model: TinyModel) -> None:
    """With one token before it, the second draft sees the key of the first's place and its own, nothing else."""
    from recipes.tiny.model import Layer

    ids = tokens(4, 6)
    layer, attn = model.mtp.layer, model.mtp.layer.self_attn
    hidden = model(torch.tensor(ids), packed([4], MICRO["index_topk"]), mtp=False).hidden
    embedded = model.embed_tokens(torch.tensor(ids))
    x1 = model.mtp.join(hidden[:1], embedded[1:2])
    q, k, v, _, _ = Layer.before(layer, x1, model.cos[:1], model.sin[:1])
    y1, _ = Layer.after(layer, x1, v)
    state = model.mtp.norm(y1)
    x2 = model.mtp.join(state, embedded[2:3])
    q, k2, v2, _, _ = Layer.before(layer, x2, model.cos[1:2], model.sin[1:2])
    weights = (torch.einsum("qhd,khd->hqk", q, torch.cat([k, k2])) * attn.scale).softmax(-1)
    y2, _ = Layer.after(layer, x2, torch.einsum("hqk,khd->qhd", weights, torch.cat([v, v2])))
    guess = model.lm_head(model.mtp.norm(y2)).argmax().item()
    assert _drafts(model, [*ids[:3], guess], 2)[1, 0] == 1


def test_interval_holds_the_share() -> None:
    low, high = interval(95, 100)
    assert low < 0.95 < high
    assert low > 0.88
    assert high < 0.985
    assert interval(10, 10)[1] == 1.0
