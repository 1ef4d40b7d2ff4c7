from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from baleen.chat.conftest import VOCAB_SIZE, build_tokenizer
from baleen.chat.encoding import BOS, EOS, THINK_END
from baleen.chat.tokenizer import Tokenizer
from baleen.config import ConfigError


def test_encode_adds_nothing(tokenizer: Tokenizer) -> None:
    inner = build_tokenizer()
    bos, eos = inner.token_to_id(BOS), inner.token_to_id(EOS)
    assert tokenizer.encode("") == []
    assert tokenizer.encode(f"{BOS}{EOS}") == [bos, eos]
    assert bos not in tokenizer.encode("Hello!")
    assert inner.decode(tokenizer.encode("Hello! 世界")) == "Hello! 世界"


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800")
    assert tokenizer.encode("\U0001f600")


def test_marks_of_reasoning_and_calls() -> None:
    inner = build_tokenizer()
    tokenizer = Tokenizer(inner)
    assert tokenizer.think_end_id == inner.token_to_id(THINK_END)
    marks = [
        "｜DSML｜",
        *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
    ]
    assert tokenizer.mark_ids == {inner.token_to_id(mark) for mark in marks}
    without = Tokenizer(tokenizers.Tokenizer(models.BPE()))
    assert (without.think_end_id, without.mark_ids) == (None, frozenset())


def test_token_bytes_of_every_kind(tokenizer: Tokenizer) -> None:
    inner = build_tokenizer()
    joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("a é 😀"))
    assert joined == "a é 😀".encode()
    assert tokenizer.token_bytes(inner.token_to_id(THINK_END)) == b"</think>"
    assert tokenizer.token_bytes(inner.token_to_id(EOS)) == EOS.encode()
    assert tokenizer.token_bytes(VOCAB_SIZE - 1) == b""  # a padding row of the model
    every_byte = {tokenizer.token_bytes(i) for i in range(tokenizer.num_ids)}
    assert {bytes([b]) for b in range(256)} <= every_byte


def test_marks_are_text_even_if_called_special() -> None:
    inner = build_tokenizer()
    inner.add_special_tokens([THINK_END])
    tokenizer = Tokenizer(inner)
    assert inner.token_to_id(THINK_END) not in tokenizer.special_ids
    assert inner.token_to_id(EOS) in tokenizer.special_ids


def test_load_refuses_what_cannot_work(tokenizer_folder: Path, tmp_path: Path) -> None:
    good = Tokenizer.from_folder(tokenizer_folder, VOCAB_SIZE)
    assert Tokenizer.from_folder(tokenizer_folder, good.num_ids).num_ids == good.num_ids
    with pytest.raises(ConfigError, match=r"vocab_size is \d+"):
        Tokenizer.from_folder(tokenizer_folder, good.num_ids - 1)
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.from_folder(tmp_path, VOCAB_SIZE)
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_folder(tmp_path, VOCAB_SIZE)
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    path.write_text(json.dumps(content | {"decoder": None}))
    with pytest.raises(ConfigError, match="ByteLevel"):
        Tokenizer.from_folder(tmp_path, VOCAB_SIZE)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    inner = build_tokenizer()
    inner.enable_truncation(4)
    inner.enable_padding(length=16)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path, VOCAB_SIZE)
    assert len(tokenizer.encode("xyzw" * 10)) > 16
    assert len(tokenizer.encode("x")) == 1


def test_longest_token(tokenizer_folder: Path) -> None:
    """Its length bounds the ids of any text from below."""
    tokenizer = Tokenizer.from_folder(tokenizer_folder, VOCAB_SIZE)
    assert tokenizer.max_token_bytes >= max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.num_ids))
