"""A small byte-level BPE tokenizer with DeepSeek's special tokens, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from baleen.chat.encoding import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER
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
    inner.add_tokens([AddedToken(t, normalized=False) for t in (THINK_START, THINK_END, USER, ASSISTANT)])
    return inner


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
