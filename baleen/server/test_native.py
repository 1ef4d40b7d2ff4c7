"""/generate, SGLang's own route."""

from __future__ import annotations

import itertools
import json
from typing import Any

from baleen.messages import unpack_ids
from baleen.server.conftest import EOS_ID, Server
from baleen.server.test_completions import echo_reversed


def post(server: Server, **body: Any) -> Any:
    with server.http() as http:
        response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_text_and_ids(server: Server) -> None:
    script = server.play("Hello")
    ids = server.tokenizer.encode("Hello")
    for body in ({"text": "hi"}, {"input_ids": server.tokenizer.encode("hi")}):
        answer = post(server, **body, sampling_params={"temperature": 0, "max_new_tokens": 20})
        assert (answer["text"], answer["output_ids"]) == ("Hello", [*ids, EOS_ID])
        meta = answer["meta_info"]
        assert meta["finish_reason"] == {"type": "stop", "matched": EOS_ID}
        assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, len(ids) + 1, 3)
        assert meta["e2e_latency"] > 0
    assert [unpack_ids(r.input_ids) for r in script.requests] == [server.tokenizer.encode("hi")] * 2
    assert script.requests[0].sampling.max_new_tokens == 20
    assert post(server, text="a")["text"] == "Hello"
    assert script.requests[-1].sampling.max_new_tokens == 128


def test_batches_are_lists(server: Server) -> None:
    server.play(reply=echo_reversed)
    params = [{"n": 2, "max_new_tokens": 1}, {"n": 2}]
    answers = post(server, text=["ab", "cd"], sampling_params=params)
    assert [a["text"] for a in answers] == ["b", "b", "dc", "dc"]
    assert answers[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 1}
    assert [a["text"] for a in post(server, input_ids=[server.tokenizer.encode("ab")])] == ["ba"]
    three = post(server, text="ab", rid="whale", sampling_params={"n": 3})
    assert [a["meta_info"]["id"] for a in three] == ["whale_0", "whale_1", "whale_2"]


def test_stream_is_cumulative(server: Server) -> None:
    server.play("Hello, world STOP it")
    body = {"text": "hi", "stream": True, "sampling_params": {"stop": ["STOP"]}}
    with server.http() as http:
        events = http.post("/generate", json=body).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    items = [json.loads(e.removeprefix("data: ")) for e in events[:-2]]
    texts = [item["text"] for item in items]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == "Hello, world "
    assert [item["meta_info"]["finish_reason"] for item in items[:-1]] == [None] * (len(items) - 1)
    assert items[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "STOP"}
    assert "index" not in items[0]
    with server.http() as http:
        events = http.post("/generate", json=body | {"text": ["a", "b"]}).text.split("\n\n")
    assert {json.loads(e.removeprefix("data: "))["index"] for e in events[:-2]} == {0, 1}


def test_logprobs_are_triples(server: Server) -> None:
    server.play("ab")
    a, b = server.tokenizer.encode("ab")
    body = {"text": "hi", "return_logprob": True, "top_logprobs_num": 1, "return_text_in_logprobs": True}
    meta = post(server, **body)["meta_info"]
    assert meta["output_token_logprobs"][:2] == [[-0.5, a, "a"], [-0.5, b, "b"]]
    assert meta["output_top_logprobs"][0] == [[-0.5, a, "a"]]
    assert meta["output_token_logprobs_length"] == 3


def test_accepts_what_sglang_clients_send(server: Server) -> None:
    """Fields with values that ask for nothing, and fields nobody knows."""
    server.play("x")
    params = {
        "max_new_tokens": 4,
        "min_new_tokens": 0,
        "stop": None,
        "stop_token_ids": None,
        "stop_regex": None,
        "spaces_between_special_tokens": True,
        "json_schema": None,
        "top_k": -1,
        "skip_special_tokens": True,
        "dtype": None,
    }
    body = {"lora_path": None, "image_data": None, "logprob_start_len": -1, "return_logprob": False, "a_new_field": 1}
    assert post(server, text="hi", sampling_params=params, **body)["text"] == "x"
