"""Text <-> ids with the checkpoint's tokenizer.json, which must be a byte-level BPE as all of DeepSeek's are."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from baleen.chat.encoding import DSML, THINK_END, THINK_START
from baleen.config import Config, ConfigError

# The parsers look for these in the text, so they are text even where a tokenizer.json calls them special.
_THINK_MARKS = (THINK_START, THINK_END)
# Of tool calls, in the formats of V3.2 and V3.1.
_CALL_MARKS = (
    DSML, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)  # fmt: skip


def _byte_of_char() -> dict[str, int]:
    """The 256 characters in which a byte-level BPE spells its tokens -> the byte each stands for.

    Bytes that print in Latin-1 stand for themselves; the other 68 are U+0100 onwards, in order (GPT-2's table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """Thread-safe; one per process. `inner` must have a ByteLevel decoder.

    num_ids           one more than the highest id
    max_token_bytes   of the longest token: a text of more than n times as many bytes has more than n ids
    special_ids       ids whose text a user does not see; V3.2's tokenizer has the mark ｜DSML｜ among them
    mark_ids          ids that tool calls are written with: whoever parses the text must see theirs
    added_ids         id -> text of the tokens that stand outside of the BPE: special ones, marks, placeholders
    think_end_id      the id of `</think>`; None if the tokenizer has no such token
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._bytes: dict[int, bytes] = {}
        vocab = inner.get_vocab(with_added_tokens=True)
        self.num_ids = max(vocab.values(), default=-1) + 1
        self.max_token_bytes = max((len(piece.encode()) for piece in vocab), default=1)
        added = inner.get_added_tokens_decoder()
        self.added_ids = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, t in added.items() if t.special and t.content not in _THINK_MARKS)
        self.mark_ids = frozenset(vocab[mark] for mark in _CALL_MARKS if mark in vocab)
        self.think_end_id: int | None = vocab.get(THINK_END)

    @classmethod
    def load(cls, config: Config) -> Tokenizer:
        """The tokenizer of a server or an offline engine. Raises ConfigError."""
        return cls.from_folder(config.load.tokenizer_path or config.model_path, config.model.vocab_size)

    @classmethod
    def from_folder(cls, folder: str | Path, vocab_size: int) -> Tokenizer:
        """Read `folder`/tokenizer.json for a model whose embedding has `vocab_size` rows. Raises ConfigError."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                "--tokenizer-path", f"{path} does not exist", "name the folder with the model's tokenizer.json"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(str(path), f"cannot be read ({error})", "fetch it again") from error
        decoder = (json.loads(inner.to_str())["decoder"] or {}).get("type")
        if decoder != "ByteLevel":
            raise ConfigError(str(path), f"its decoder is {decoder!r}", "take DeepSeek's, whose decoder is 'ByteLevel'")
        tokenizer = cls(inner)
        if tokenizer.num_ids > vocab_size:
            problem = f"it has ids up to {tokenizer.num_ids - 1}, but config.json's vocab_size is {vocab_size}"
            raise ConfigError(str(path), problem, "take both files from the same model")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and nothing else: no bos is added.

        Special tokens that are spelled in `text` become their ids, also where a user wrote them: as in all engines.
        Raises ValueError for half a surrogate pair, which is no text.
        """
        try:
            return self._inner.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError("a lone surrogate (half of a \\ud83d\\ude00 pair) is not text") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text; none for an id without a token (the model's padding rows)."""
        data = self._bytes.get(token_id)
        if data is None:
            piece = self._inner.id_to_token(token_id) or ""
            try:
                data = bytes([_BYTE_OF_CHAR[char] for char in piece])
            except KeyError:  # an added token is spelled as it reads
                data = piece.encode()
            self._bytes[token_id] = data
        return data

    def token_text(self, token_id: int) -> str:
        """The token alone as text; an incomplete character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")
