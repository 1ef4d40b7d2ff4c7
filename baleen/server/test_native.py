"""/generate, SGLang's own route."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

from baleen.messages import Grammar, unpack_ids
from baleen.server.conftest import EOS_ID, Server, wait_until
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


def test_prompt_logprobs_from_a_place_on(server: Server) -> None:
    script = server.play("ab")
    ids = server.tokenizer.encode("hello")
    body = {"input_ids": ids, "return_logprob": True, "top_logprobs_num": 1}
    expected = [[None, ids[0], None], *([-i / 8, ids[i], None] for i in range(1, len(ids)))]
    for start in (0, 2, len(ids) - 1):
        meta = post(server, **body, logprob_start_len=start)["meta_info"]
        assert meta["input_token_logprobs"] == expected[start:]
        assert meta["input_top_logprobs"] == [None if lp[0] is None else [lp] for lp in expected[start:]]
        assert len(meta["output_token_logprobs"]) == 3
    assert [r.sampling.prompt_logprobs for r in script.requests] == [0, 2, len(ids) - 1]
    for start in (-1, len(ids), None):
        meta = post(server, **body, logprob_start_len=start)["meta_info"]
        assert meta["input_token_logprobs"] == meta["input_top_logprobs"] == []
    assert "input_token_logprobs" not in post(server, input_ids=ids, logprob_start_len=0)["meta_info"]
    assert [r.sampling.prompt_logprobs for r in script.requests[3:]] == [None] * 4


def test_nothing_to_generate(server: Server) -> None:
    server.play("ab")
    answer = post(server, text="hi", sampling_params={"max_new_tokens": 0})
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert answer["meta_info"]["completion_tokens"] == 0


def test_every_sampling_parameter(server: Server) -> None:
    script = server.play("ab12!")
    params = {
        "logit_bias": {"3": 1},
        "min_new_tokens": 2,
        "stop_regex": ["zz", "[0-9]+!"],
        "no_stop_trim": True,
        "sampling_seed": 5,
    }
    answer = post(server, text="hi", sampling_params=params | {"ebnf": "root ::= 'a'"})
    assert (answer["text"], answer["meta_info"]["finish_reason"]["matched"]) == ("ab12!", "[0-9]+!")
    s = script.requests[0].sampling
    assert (s.logit_bias, s.min_new_tokens, s.seed) == (((3, 1.0),), 2, 5)
    assert s.grammar == Grammar(kind="ebnf", text="root ::= 'a'")
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    constraints = [{"regex": "a"}, {"json_schema": '{"const": 1}'}, {"structural_tag": json.dumps(tag)}]
    script = server.play("x")
    post(server, text=["a", "b", "c"], sampling_params=constraints)
    assert [r.sampling.grammar.kind for r in script.requests if r.sampling.grammar] == [
        "regex",
        "json_schema",
        "structural_tag",
    ]


def test_reasoning_is_counted_and_free_of_the_grammar(server: Server) -> None:
    script = server.play("ab</think>c")
    for required, count in ((True, 3), (False, 0)):
        body = {"text": "q<think>", "require_reasoning": required, "sampling_params": {"regex": "c"}}
        assert post(server, **body)["meta_info"]["reasoning_tokens"] == count
    starts = [r.sampling.grammar.starts_after for r in script.requests if r.sampling.grammar]
    assert starts == [server.tokenizer.think_end_id, None]


def test_names_of_requests(server: Server) -> None:
    server.play("x")

    def names(**body: Any) -> list[str]:
        answers = post(server, **body)
        return [a["meta_info"]["id"] for a in (answers if isinstance(answers, list) else [answers])]

    assert names(text="a", rid="one") == ["one"]
    assert names(text=["a", "b"], rid="many") == ["many_0", "many_1"]
    assert names(text=["a", "b"], rid=["x", "y"]) == ["x", "y"]
    assert names(text=["a", "b"], rid=["x", "y"], sampling_params={"n": 2}) == ["x_0", "x_1", "y_0", "y_1"]
    assert names(input_ids=[[1], [2]], rid=["x", "y"]) == ["x", "y"]
    assert post(server, input_ids=[5, 6], return_prompt_token_ids=True)["prompt_token_ids"] == [5, 6]


def test_stream_interval(server: Server) -> None:
    server.play("abcdefgh", pause=0.005)
    body = {"text": "hi", "stream": True, "sampling_params": {"stream_interval": 4}}
    with server.http() as http:
        events = http.post("/generate", json=body).text.split("\n\n")[:-2]
    counts = [json.loads(e.removeprefix("data: "))["meta_info"]["completion_tokens"] for e in events]
    assert counts[-1] == 9
    assert len(counts) <= 4
    assert all(later - earlier >= 4 for earlier, later in itertools.pairwise(counts[:-1]))


def test_an_abort_is_an_answer_with_what_there_is(server: Server) -> None:
    script = server.play("abcdef" * 20, pause=0.01)

    def abort_soon() -> None:
        wait_until(lambda: script.requests and server.client.num_open)
        time.sleep(0.05)
        with server.http() as http:
            assert http.post("/abort_request", json={"rid": "whale"}).status_code == 200

    thread = threading.Thread(target=abort_soon)
    thread.start()
    answer = post(server, text="hi", rid="whale")
    thread.join()
    assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "aborted by request"}
    assert answer["text"].startswith("abc")
    assert answer["meta_info"]["completion_tokens"] == len(answer["output_ids"]) > 0


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
    body = {
        "stream_options": {"x": 1},
        "require_reasoning": False,
        "log_metrics": True,
        "lora_path": "",
        "image_data": None,
        "logprob_start_len": -1,
        "return_logprob": False,
        "a_new_field": 1,
    }
    assert post(server, text="hi", sampling_params=params, **body)["text"] == "x"
