"""Any chunking of any ids, with any stops, gives the text of decoding all at once and cutting it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.chat.conftest import VOCAB_SIZE, build_tokenizer
from baleen.chat.detokenizer import MAX_REGEX_CHARS, Detokenizer, StopRegexTimeout, compile_stop_regex
from baleen.chat.tokenizer import Tokenizer

INNER = build_tokenizer()
TOKENIZER = Tokenizer(INNER)

ids_of_text = st.text(alphabet="ab é世😀\u0301", max_size=24).map(TOKENIZER.encode)
any_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=24)
ids = st.one_of(any_ids, ids_of_text, st.tuples(any_ids, ids_of_text).map(lambda pair: pair[0] + pair[1]))


def chunked(data: st.DataObject, items: list[int]) -> list[list[int]]:
    chunks = []
    while items:
        size = data.draw(st.integers(1, 4))
        chunks.append(items[:size])
        items = items[size:]
    return chunks


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read character by character until the text ends in a stop string; drop the longest such."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(ids, st.data(), st.booleans())
def test_any_chunking_equals_decoding_at_once(token_ids: list[int], data: st.DataObject, skip: bool) -> None:
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=skip)
    pieces = [detokenizer.push(chunk) for chunk in chunked(data, token_ids)]
    assert "".join(pieces) + detokenizer.finish() == INNER.decode(token_ids, skip_special_tokens=skip)
    assert detokenizer.num_tokens == len(token_ids)


@settings(max_examples=400, deadline=None)
@given(ids, st.booleans(), st.data())
def test_any_stop_strings_cut_where_the_definition_cuts(
    token_ids: list[int], no_stop_trim: bool, data: st.DataObject
) -> None:
    whole = INNER.decode(token_ids)
    pieces_of_text = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 3, 5) if whole[i : i + n]]
    sources = [st.text(alphabet="ab é世", min_size=1, max_size=3)]
    sources += [st.sampled_from(pieces_of_text)] if pieces_of_text else []
    stops = data.draw(st.lists(st.one_of(*sources), max_size=3))
    detokenizer = Detokenizer(TOKENIZER, stops, no_stop_trim=no_stop_trim)
    text = "".join([detokenizer.push(chunk) for chunk in chunked(data, token_ids)]) + detokenizer.finish()
    if no_stop_trim and detokenizer.matched is not None:
        assert text.endswith(detokenizer.matched)
        text = text.removesuffix(detokenizer.matched)
    assert (text, detokenizer.matched) == cut(whole, stops)
    # Nothing that came before the match needed a later token, and no token after it was read.
    if detokenizer.matched is not None and detokenizer.num_tokens < len(token_ids):
        read = INNER.decode(token_ids[: detokenizer.num_tokens])
        assert cut(read, stops) == (text, detokenizer.matched)
        assert cut(INNER.decode(token_ids[: detokenizer.num_tokens - 1]).rstrip("\ufffd"), stops)[1] is None


@pytest.mark.parametrize("text", ["世界", "😀", "é😀"])
def test_only_whole_characters_come_out(text: str) -> None:
    byte_ids = [
        next(i for i in range(TOKENIZER.num_ids) if TOKENIZER.token_bytes(i) == bytes([b])) for b in text.encode()
    ]
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push([i]) for i in byte_ids]
    assert [p for p in pieces if p] == list(text)
    detokenizer.push(byte_ids[:1])
    assert detokenizer.finish() == "\ufffd"  # the end came inside a character


def test_a_possible_stop_string_is_withheld_and_no_more() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["END."])
    letters = [TOKENIZER.encode(c)[0] for c in "aENxEND!"]
    assert [detokenizer.push([i]) for i in letters] == ["a", "", "", "ENx", "", "", "", "END!"]
    assert detokenizer.push(TOKENIZER.encode("zEND. more")) == "z"
    assert detokenizer.matched == "END."
    assert detokenizer.push(TOKENIZER.encode("more")) == ""
    assert detokenizer.finish() == ""


def test_withheld_text_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["stop it"])
    assert detokenizer.push(TOKENIZER.encode("please stop")) == "please "
    assert detokenizer.finish() == "stop"


def test_num_tokens_counts_to_the_match_inside_a_chunk() -> None:
    letters = [TOKENIZER.encode(c)[0] for c in "abXYcd"]
    detokenizer = Detokenizer(TOKENIZER, ["XY"])
    assert detokenizer.push(letters) == "ab"
    assert detokenizer.num_tokens == 4


# ---- stop_regex

REGEXES = [
    "and|or",
    r"[.!?]\s*$",
    "a+b",
    "b.?世",
    "(?i)B A",
    "^a",
    "b$",
    "(?<=a)b",
    r"(ab|é) *\1",
    "a(?=b)",
    "[^ab]{2}",
    "z*",
]


def cut_by_regex(token_ids: list[int], stops: list[str], patterns: list[str], trim: bool) -> tuple[str, str | None]:
    """The definition: after each token, search the whole text so far with Python's own `re`."""
    detokenizer = Detokenizer(TOKENIZER)
    text = ""
    for piece in [*(detokenizer.push([token_id]) for token_id in token_ids), detokenizer.finish()]:
        text += piece
        if piece:
            before, stop = cut(text, stops)
            if stop is not None:
                return before if trim else before + stop, stop
            for pattern in patterns:
                match = re.search(pattern, text)
                if match:
                    return text[: match.start() if trim else match.end()], pattern
    return text, None


@settings(max_examples=600, deadline=None)
@given(
    ids,
    st.lists(st.sampled_from(REGEXES), max_size=2),
    st.lists(st.sampled_from(["ba", "世", "a b"]), max_size=1),
    st.booleans(),
    st.data(),
)
def test_stop_regex_cuts_where_the_definition_cuts(
    token_ids: list[int], patterns: list[str], stops: list[str], trim: bool, data: st.DataObject
) -> None:
    detokenizer = Detokenizer(TOKENIZER, stops, stop_regex=patterns, no_stop_trim=not trim)
    text = "".join([detokenizer.push(chunk) for chunk in chunked(data, token_ids)]) + detokenizer.finish()
    assert (text, detokenizer.matched) == cut_by_regex(token_ids, stops, patterns, trim)


def letters(detokenizer: Detokenizer, text: str) -> list[str]:
    return [detokenizer.push(TOKENIZER.encode(char)) for char in text]


def test_what_a_stop_regex_may_still_match_is_withheld_and_no_more() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop_regex=["fo+ba", "x.*y"])
    assert letters(detokenizer, "afoobfooz") == ["a", "", "", "", "", "foob", "", "", "fooz"]
    assert letters(detokenizer, "xab\nc") == ["", "", "", "xab\n", "c"]
    assert letters(detokenizer, "afoba") == ["a", "", "", "", ""]
    assert detokenizer.matched == "fo+ba"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(
    "source", ["(", "[", "*a", "a{2", r"(?P<a>x)(?P<a>y)", "(?R)", r"\p{L}", "(?<=a+)b", "a{99999999999}"]
)
def test_a_bad_regex_is_refused(source: str) -> None:
    try:
        re.compile(source)
    except (re.error, OverflowError):
        with pytest.raises(ValueError, match="is not a regular expression"):
            compile_stop_regex(source)
        with pytest.raises(ValueError, match=re.escape(repr(source))):
            Detokenizer(TOKENIZER, stop_regex=[source])
    else:
        assert source == "a{2"  # a literal
        compile_stop_regex(source)


def test_a_regex_that_is_too_long_is_refused() -> None:
    """A search for what may begin a match takes the cube of a literal's length: 40 s for 5,000 characters."""
    assert compile_stop_regex("x" * MAX_REGEX_CHARS)
    with pytest.raises(ValueError, match="is too long"):
        compile_stop_regex("x" * (MAX_REGEX_CHARS + 1))


def test_a_regex_that_takes_too_long_ends_with_an_error() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop_regex=["(.*?,){15}P"])
    with pytest.raises(StopRegexTimeout, match="takes more than"):
        detokenizer.push(TOKENIZER.encode(",".join(str(n) for n in range(30))))


def test_special_ids_that_are_shown(real_tokenizer: Tokenizer) -> None:
    token_ids = real_tokenizer.encode("<｜DSML｜invoke><｜end▁of▁sentence｜>")
    assert Detokenizer(real_tokenizer).push(token_ids) == "<invoke>"
    assert Detokenizer(real_tokenizer, shown={token_ids[1]}).push(token_ids) == "<｜DSML｜invoke>"
    shown = Detokenizer(real_tokenizer, shown={token_ids[1]}, skip_special_tokens=False)
    assert shown.push(token_ids) == "<｜DSML｜invoke><｜end▁of▁sentence｜>"
