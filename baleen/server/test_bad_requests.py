"""Every 4xx is OpenAI's error object with the field named; no body gives a 5xx."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baleen.server.conftest import CONTEXT, VOCAB_SIZE, Server

HI = [{"role": "user", "content": "hi"}]
IMAGE = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": "x"}}]
TOOL = {"type": "function", "function": {"name": "f"}}
ALLOW = {"type": "allowed_tools"}

# field, value, `param` of the error if it is another name
CHAT = [
    ("temperature", -0.1, None),
    ("temperature", 2.1, None),
    ("temperature", "1", None),
    ("top_p", 0, None),
    ("top_p", 1.5, None),
    ("top_k", 0, None),
    ("top_k", -2, None),
    ("min_p", 1.1, None),
    ("frequency_penalty", 2.5, None),
    ("presence_penalty", -2.5, None),
    ("repetition_penalty", 0, None),
    ("repetition_penalty", 1e-30, None),  # logits would overflow
    ("n", 0, None),
    ("n", 1.5, None),
    ("n", 100_000, None),
    ("seed", 2**63, None),
    ("seed", "one", None),
    ("stop", 3, None),
    ("stop", ["a", 3], "stop[1]"),
    ("stop", ["a", ""], None),
    ("stop_token_ids", [-1], "stop_token_ids[0]"),
    ("stop_token_ids", 5, None),
    ("ignore_eos", "no", None),
    ("logprobs", 2, None),
    ("top_logprobs", 3, None),  # without logprobs: true
    ("top_logprobs", 21, None),
    ("max_tokens", -1, None),
    ("max_tokens", 10**6, None),
    ("max_completion_tokens", CONTEXT, None),
    ("stream", 1, None),
    ("stream_options", {"include_usage": True}, None),  # without stream
    ("chat_template_kwargs", {"thinking": 1}, None),
    ("chat_template_kwargs", {"enable_thinking": "yes"}, None),
    ("reasoning_effort", "huge", None),
    ("messages", None, None),
    ("messages", [], None),
    ("messages", "hi", None),
    ("messages", ["hi"], "messages[0]"),
    ("messages", [*HI, {"role": "user"}], "messages[1].content"),
    ("messages", [*HI, {"role": "robot", "content": "x"}], "messages[1].role"),
    ("messages", [{"role": "user", "content": IMAGE}], "messages[0].content[1].type"),
    ("messages", [{"role": "tool", "content": "x"}, *HI], "messages[0].role"),
    ("messages", [{"role": "assistant", "tool_calls": [{}]}, *HI], "messages[0].tool_calls[0].function"),
    ("messages", [{"role": "system", "content": "x", "tools": [5]}, *HI], "messages[0].tools[0]"),
    ("messages", [*HI, {"role": "assistant", "content": "x"}], "messages[1].role"),
    ("messages", [{"role": "user", "content": "long " * CONTEXT}], "messages"),
    ("tools", {"f": 1}, None),
    ("tools", [TOOL, 5], "tools[1]"),
    ("tools", [TOOL, {"type": "custom", "custom": {"name": "x"}}], "tools[1].type"),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"type": "function", "function": {"name": "two words"}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": ""}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
     "tools[0].function.parameters"),
    ("tools", [{"type": "function", "function": {"name": "f", "strict": "yes"}}], "tools[0].function.strict"),
    ("tools", [{"type": "function", "function": {"name": "f", "defer_loading": True}}],
     "tools[0].function.defer_loading"),
    ("tools", [TOOL, TOOL], "tools[1].function.name"),
    ("tool_choice", "required", None),
    ("tool_choice", "any", None),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, None),
    ("tool_choice", {"type": "function", "name": "f"}, None),
    ("tool_choice", 5, None),
    ("parallel_tool_calls", "no", None),
    ("functions", [{"name": "f"}], None),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema.schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": 5}}, "response_format.json_schema.schema"),
    ("response_format", {"type": "structural_tag"}, None),
    ("response_format", {"type": "structural_tag", "structures": [5], "triggers": []}, "response_format.structures[0]"),
    ("structural_tag", "{", None),
    ("json_schema", "INVALID", None),
    ("json_schema", "[1]", None),
    ("json_schema", "[" * 10_000, None),
    ("json_schema", 5, None),
    ("regex", "", None),
    ("regex", 5, None),
    ("ebnf", "", None),
    ("logit_bias", {"5": 101}, "logit_bias.5"),
    ("logit_bias", {"five": 1}, None),
    ("logit_bias", {"05": 1}, None),
    ("logit_bias", {str(VOCAB_SIZE): 1}, None),
    ("logit_bias", [1], None),
    ("min_tokens", CONTEXT, None),
    ("min_tokens", -1, None),
    ("stop_regex", "(", None),
    ("stop_regex", [""], None),
    ("thinking", {"type": "maybe"}, "thinking.type"),
    ("thinking", {"type": "enabled", "budget_tokens": 5}, "thinking.budget_tokens"),
    ("thinking", "yes", None),
    ("reasoning", {"effort": "huge"}, "reasoning.effort"),
    ("reasoning", {"max_tokens": 9}, "reasoning.max_tokens"),
    ("chat_template_kwargs", {"reasoning_effort": "huge"}, None),
    ("chat_template_kwargs", {"force_nonempty_content": True}, None),
    ("input_ids", [VOCAB_SIZE], None),
    ("input_ids", [], None),
    ("input_ids", "1", None),
    ("lora_path", "x", None),
    ("priority", 3, None),
    ("audio", {"voice": "a"}, None),
    ("modalities", ["text", "audio"], None),
    ("session_id", "s", None),
    ("cache_salt", "s", None),
    ("rid", "", None),
    ("rid", 5, None),
    ("continue_final_message", True, None),  # the last message is the user's
]  # fmt: skip
COMPLETIONS = [
    ("prompt", None, None),
    ("prompt", "", None),
    ("prompt", [], None),
    ("prompt", {"a": 1}, None),
    ("prompt", ["a", 1], None),
    ("prompt", [1, "a"], None),
    ("prompt", [True], None),
    ("prompt", [[]], None),
    ("prompt", [VOCAB_SIZE], None),
    ("prompt", [-1], None),
    ("prompt", [10**30], None),
    ("prompt", "x" * CONTEXT * 2, None),
    ("max_tokens", CONTEXT, None),
    ("logprobs", -1, None),
    ("logprobs", 21, None),
    ("logprobs", True, None),
    ("echo", "yes", None),
    ("suffix", "x", None),
    ("best_of", 2, None),
    ("min_tokens", 17, None),  # above the default of max_tokens
    ("json_schema", "{", None),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema.schema"),
    ("logit_bias", {"-1": 1}, None),
    ("stop_regex", "[", None),
    ("model", 5, None),
]
NATIVE = [
    ("text", None, None),
    ("text", "", None),
    ("text", 5, None),
    ("text", [], None),
    ("text", "x" * CONTEXT * 2, None),
    ("input_ids", [1], "text"),  # both
    ("sampling_params", {"temperature": -1}, "sampling_params.temperature"),
    ("sampling_params", {"max_new_tokens": CONTEXT}, "sampling_params.max_new_tokens"),
    ("sampling_params", {"max_new_tokens": -1}, "sampling_params.max_new_tokens"),
    ("sampling_params", {"max_new_tokens": 4, "min_new_tokens": 5}, "sampling_params.min_new_tokens"),
    ("sampling_params", {"regex": ""}, "sampling_params.regex"),
    ("sampling_params", {"regex": "a", "json_schema": "{}"}, "sampling_params.regex"),
    ("sampling_params", {"json_schema": "INVALID"}, "sampling_params.json_schema"),
    ("sampling_params", {"structural_tag": {"structures": []}}, "sampling_params.structural_tag"),
    ("sampling_params", {"logit_bias": {str(VOCAB_SIZE): 1}}, "sampling_params.logit_bias"),
    ("sampling_params", {"custom_params": {"a": 1}}, "sampling_params.custom_params"),
    ("sampling_params", {"stream_interval": 0}, "sampling_params.stream_interval"),
    ("sampling_params", [{}, {}], "sampling_params"),
    ("sampling_params", [{"stop_regex": "("}], "sampling_params[0].stop_regex"),
    ("sampling_params", [{"logit_bias": {str(VOCAB_SIZE): 1}}], "sampling_params[0].logit_bias"),
    ("sampling_params", [{"top_k": 0}], "sampling_params[0].top_k"),
    ("sampling_params", [5], None),
    ("sampling_params", 5, None),
    ("image_data", "x", None),
    ("logprob_start_len", -2, None),
    ("rid", [], None),
    ("rid", ["a", "b"], None),
    ("rid", ["a", 5], None),
    ("priority", 1, None),
    ("return_hidden_states", True, None),
    ("top_logprobs_num", 50, None),
]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "hi"},
    "/generate": {"text": "hi"},
}
CASES = [
    (path, *case)
    for path, cases in zip(ROUTES, (CHAT, COMPLETIONS, NATIVE))
    for case in cases
]  # fmt: skip


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


@pytest.mark.parametrize(("path", "field", "value", "param"), CASES)
def test_bad_value_names_its_field(server: Server, path: str, field: str, value: Any, param: str | None) -> None:
    script = server.play("x")
    with server.http() as http:
        error = error_of(http.post(path, json=ROUTES[path] | {field: value}), 400)
    assert error["param"] == (param or field)
    assert error["message"].startswith(f"{param or field}: ")
    assert not script.requests


def test_the_same_error_before_a_stream_is_plain_http(server: Server) -> None:
    with server.http() as http:
        for path, body in ROUTES.items():
            error_of(http.post(path, json=body | {"stream": True, "sampling_params": {"top_p": 2}, "top_p": 2}), 400)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"regex": "a", "ebnf": "root ::= 'a'"}, "ebnf"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"regex": "a", "tools": [TOOL]}, "regex"),
        ({"ebnf": "root ::= 'a'", "tools": [TOOL], "tool_choice": "required"}, "ebnf"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": ALLOW | {"allowed_tools": {"mode": "none", "tools": [TOOL]}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": ALLOW | {"allowed_tools": {"mode": "auto", "tools": []}}},
         "tool_choice.allowed_tools.tools"),
        ({"tools": [TOOL], "tool_choice": ALLOW | {"allowed_tools": {"mode": "auto", "tools": ["f"]}}},
         "tool_choice.allowed_tools.tools[0]"),
        ({"input_ids": [5], "continue_final_message": True}, "continue_final_message"),
        ({"stream": True, "return_meta_info": True}, "return_meta_info"),
        ({"stream": True, "return_prompt_token_ids": True}, "return_prompt_token_ids"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together(server: Server, extra: dict[str, Any], param: str) -> None:
    script = server.play("x")
    with server.http() as http:
        error = error_of(http.post("/v1/chat/completions", json={"messages": HI} | extra), 400)
    assert error["param"] == param
    assert not script.requests


def test_prompt_logprobs_must_start_in_the_prompt(server: Server) -> None:
    body = {"text": "hi", "return_logprob": True, "logprob_start_len": 3}
    with server.http() as http:
        assert error_of(http.post("/generate", json=body), 400)["param"] == "logprob_start_len"


def test_values_that_ask_for_nothing_are_fine(server: Server) -> None:
    server.play("x")
    harmless = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "logit_bias": {},
        "min_tokens": 0,
        "modalities": ["text"],
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "a_field_of_next_year": {"x": 1},
    }
    nothing = dict.fromkeys(("n", "seed", "stop", "temperature", "top_p", "stream", "max_tokens", "logprobs", "tools"))
    with server.http() as http:
        for extra in (harmless, nothing):
            answer = http.post("/v1/chat/completions", json={"messages": HI} | extra)
            assert answer.status_code == 200, answer.text


def test_lengths_are_told_with_numbers(server: Server) -> None:
    ids = [7] * (CONTEXT - 10)
    with server.http() as http:
        fits = http.post("/v1/completions", json={"prompt": ids, "max_tokens": 10})
        over = error_of(http.post("/v1/completions", json={"prompt": ids, "max_tokens": 11}), 400)
        longer = error_of(http.post("/v1/completions", json={"prompt": [7] * (CONTEXT + 4)}), 400)
        full = error_of(http.post("/v1/completions", json={"prompt": [7] * CONTEXT}), 400)
    assert fits.status_code == 200
    assert (over["param"], over["code"]) == ("max_tokens", "context_length_exceeded")
    assert all(str(n) in over["message"] for n in (CONTEXT - 10, 11, CONTEXT, 10))
    assert (longer["param"], longer["code"]) == ("prompt", "context_length_exceeded")
    assert str(CONTEXT + 4) in longer["message"]
    assert str(CONTEXT) in longer["message"]
    assert full["param"] == "prompt"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_a_text_that_cannot_fit_is_not_tokenized(server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(text: str) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(server.tokenizer, "encode", encode)
    text = "x" * (CONTEXT * server.tokenizer.max_token_bytes)
    body = {"messages": [{"role": "user", "content": text}], "prompt": text, "text": text}
    with server.http() as http:
        error = error_of(http.post(path, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}.get(path, "text")
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
             b'{"prompt": "\\udfff"}', b'{"text": "\\ud800"}', b"[" * 100_000]
)  # fmt: skip
@pytest.mark.parametrize("path", ROUTES)
def test_malformed_bodies(server: Server, path: str, body: bytes) -> None:
    with server.http() as http:
        error_of(http.post(path, content=body, headers={"content-type": "application/json"}), 400)


def test_content_type_routes_methods_and_models(server: Server) -> None:
    with server.http() as http:
        error = error_of(http.post("/v1/completions", data={"prompt": "x"}), 400)
        assert error["code"] == "unsupported_media_type"
        assert error_of(http.get("/v2/nothing"), 404)["code"] == "not_found"
        assert error_of(http.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
        assert error_of(http.delete("/health"), 405)["code"] == "method_not_allowed"
        assert error_of(http.get("/v1/models/gpt-5"), 404)["code"] == "model_not_found"
        for path in ("/v1/chat/completions", "/v1/completions"):
            error = error_of(http.post(path, json=ROUTES[path] | {"model": "gpt-5"}), 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_openai_client_raises_its_own_errors(server: Server) -> None:
    client = server.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="default", messages=HI, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=HI)
    assert unknown.value.code == "model_not_found"


values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
names = {
    "/v1/chat/completions": sorted({c[0] for c in CHAT}),
    "/v1/completions": sorted({c[0] for c in CHAT + COMPLETIONS} - {"messages"}),
    "/generate": sorted({c[0] for c in NATIVE}),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(ROUTES)), st.data())
def test_fuzzed_bodies_never_give_a_500(server: Server, path: str, data: st.DataObject) -> None:
    server.play("x")
    fields = data.draw(st.dictionaries(st.sampled_from(names[path]), values, max_size=3))
    with server.http() as http:
        response = http.post(
            path, content=json.dumps(ROUTES[path] | fields).encode(), headers={"content-type": "application/json"}
        )
    if response.status_code != 200:
        error_of(response, response.status_code)
        assert response.status_code in (400, 404)
