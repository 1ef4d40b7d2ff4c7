"""The byte-level BPE tokenizer of the bundled model, trained on samples of its own data.

    python -m recipes.tiny.tokenizer        # writes recipes/tiny/tokenizer/

Every digit is a token of its own, so that numbers are read place by place.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from baleen.model.random_checkpoint import FIRST_TOKENS, LAST_TOKENS

FOLDER = Path(__file__).parent / "tokenizer"
VOCAB_SIZE = 4096


def train(texts: Iterator[str]) -> Tokenizer:
    """Ids 0 to 2: bos, eos, pad; then bytes and merges; the family's other special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    first = [AddedToken(token, special=True, normalized=False) for token in FIRST_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(LAST_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=first,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = VOCAB_SIZE - len(LAST_TOKENS) - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([
        AddedToken(f"<｜place▁holder▁no▁{n}｜>", special=True, normalized=False) for n in range(missing)
    ])  # fmt: skip
    for token, special in LAST_TOKENS.items():
        added = AddedToken(token, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int = 16384) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = FIRST_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad,
        "unk_token": None, "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def _samples(count: int) -> Iterator[str]:
    from recipes.tiny import data

    rng = random.Random(0)
    english = (
        "The people of the world speak many languages. Where there is a question, there should be an answer. "
        "This small model was trained to reason about numbers, to read long texts and to call functions."
    )
    for _ in range(count):
        document = data.document(rng, rng.choice(list(data.TASKS)), "train", length=700)
        yield from (text for text, _ in document.segments)
        if rng.random() < 0.02:
            yield english


if __name__ == "__main__":
    save(train(_samples(20000)), FOLDER)
