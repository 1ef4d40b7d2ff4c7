from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.chat.output_parser import Delta, ThinkSplitter

pieces = st.lists(
    st.sampled_from(["</think>", "</", "</thi", "nk>", "<", ">", "<think>", "a", "世", "\n"]), max_size=12
)


def split(chunks: list[str], thinking: bool) -> tuple[str, str]:
    splitter = ThinkSplitter(thinking=thinking)
    deltas = [splitter.push(chunk) for chunk in chunks] + [splitter.finish()]
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)


@settings(max_examples=300, deadline=None)
@given(pieces, st.data())
def test_any_chunking_splits_at_the_first_tag(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    before, _, after = text.partition("</think>")
    assert split(chunks, thinking=True) == (before, after)
    assert split(chunks, thinking=False) == ("", text)


def test_reasoning_is_not_held_back_longer_than_needed() -> None:
    splitter = ThinkSplitter(thinking=True)
    assert splitter.push("abc</th") == Delta("abc", "")
    assert splitter.push("e end") == Delta("</the end", "")
    assert splitter.push("</think>x") == Delta("", "x")
    assert splitter.push("</think>") == Delta("", "</think>")
