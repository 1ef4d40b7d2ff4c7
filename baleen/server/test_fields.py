"""Every field of OpenAI's and SGLang's schemas is done, refused by name, or said to have no effect."""

from __future__ import annotations

import pathlib
import re
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_completion_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from baleen.server.conftest import Server
from baleen.server.fields import RequestModel
from baleen.server.native import GenerateBody, GenerateSampling
from baleen.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from baleen.server.test_bad_requests import HI, error_of

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "http_api.md"

# What SGLang adds, as its clients send it.
OPENAI_EXTENSIONS = """
    top_k min_p min_tokens repetition_penalty regex ebnf stop_token_ids stop_regex no_stop_trim ignore_eos
    skip_special_tokens rid session_id session_params lora_path extra_key cache_salt priority custom_logit_processor
    custom_params return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details
    return_prompt_token_ids return_meta_info bootstrap_host bootstrap_port bootstrap_room routed_dp_rank
    disagg_prefill_dp_rank data_parallel_rank response_format stream_options
"""
CHAT_EXTENSIONS = """
    continue_final_message separate_reasoning stream_reasoning chat_template_kwargs input_ids task reasoning thinking
    include_reasoning reasoning_effort max_completion_tokens
"""
SAMPLING = """
    max_new_tokens min_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty
    presence_penalty repetition_penalty n json_schema regex ebnf structural_tag ignore_eos skip_special_tokens
    spaces_between_special_tokens no_stop_trim custom_params stream_interval logit_bias sampling_seed
"""
NATIVE = """
    text input_ids input_embeds sampling_params rid return_logprob logprob_start_len top_logprobs_num token_ids_logprob
    return_text_in_logprobs stream log_metrics return_hidden_states return_routed_experts routed_experts_start_len
    return_indexer_topk return_sampling_mask session_id session_params lora_path custom_logit_processor bootstrap_host
    bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size routed_dp_rank disagg_prefill_dp_rank
    data_parallel_rank routing_key conversation_id require_reasoning priority extra_key no_logs custom_labels
    return_entropy return_prompt_token_ids image_data video_data audio_data background return_bytes
"""


def typed(params: Any) -> list[str]:
    return sorted(get_type_hints(params))


ROUTES: dict[str, tuple[type[RequestModel], list[str]]] = {
    "chat": (
        ChatRequest,
        typed(chat_completion_create_params.CompletionCreateParamsStreaming)
        + OPENAI_EXTENSIONS.split()
        + CHAT_EXTENSIONS.split(),
    ),
    "completions": (
        CompletionRequest,
        [*typed(completion_create_params.CompletionCreateParamsStreaming), *OPENAI_EXTENSIONS.split(), "json_schema"],
    ),
    "generate": (GenerateBody, NATIVE.split()),
    "generate sampling": (GenerateSampling, SAMPLING.split()),
}
CASES = [(route, name) for route, (_, names) in ROUTES.items() for name in dict.fromkeys(names)]


def documented() -> dict[tuple[str, str], str]:
    """(route, field) -> what the table says of it."""
    rows: dict[tuple[str, str], str] = {}
    for line in DOCS.read_text().splitlines():
        match = re.match(r"\| (`.+?) \| (\w[\w, ]*) \| (.*) \|$", line)
        if match:
            routes = ["chat", "completions", "generate"] if match[2] == "all" else match[2].split(", ")
            for name in re.findall(r"`(\w+)`", match[1]):
                for route in routes:
                    assert (route, name) not in rows, f"two rows for {name}"
                    rows[route, name] = match[3]
    return rows


TABLE = documented()


@pytest.mark.parametrize(("route", "name"), CASES)
def test_every_known_field_is_in_the_table_and_treated_so(route: str, name: str) -> None:
    model = ROUTES[route][0]
    says = TABLE[route.split()[0], name]
    if name in model.model_fields:
        assert not says.startswith("refused") or says.startswith("refused unless")
    elif name in model.refused:
        assert says.startswith("refused")
    else:
        assert says.startswith("no effect")


def test_the_table_has_nothing_else() -> None:
    """What it names is a field of the model, refused, or one that clients really send."""
    for (route, name), says in TABLE.items():
        models = [model for title, (model, _) in ROUTES.items() if title.split()[0] == route]
        known = any(name in model.model_fields or name in model.refused for model in models)
        assert known or says.startswith("no effect"), (route, name)
    for title, (model, _) in ROUTES.items():
        for name in [*model.model_fields, *model.refused]:
            assert (title.split()[0], name) in TABLE, f"{name} of {title} is not documented"


def test_stream_options() -> None:
    for name in [*typed(ChatCompletionStreamOptionsParam), "continuous_usage_stats"]:
        assert name in StreamOptions.model_fields or name in StreamOptions.refused


PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "generate": "/generate"}
MINIMAL: dict[str, dict[str, Any]] = {
    "chat": {"messages": HI},
    "completions": {"prompt": "hi"},
    "generate": {"text": "hi"},
}


@pytest.mark.parametrize("route", PATHS)
def test_refused_fields_are_refused_and_their_harmless_values_are_not(server: Server, route: str) -> None:
    server.play("x")
    model = ROUTES[route][0]
    with server.http() as http:
        for name, harmless in model.refused.items():
            error = error_of(http.post(PATHS[route], json=MINIMAL[route] | {name: "something else"}), 400)
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            for value in (None, *harmless):
                answer = http.post(PATHS[route], json=MINIMAL[route] | {name: value})
                assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("route", PATHS)
def test_fields_without_effect_are_accepted(server: Server, route: str) -> None:
    server.play("x")
    names = [name for (of, name), says in TABLE.items() if of == route and says.startswith("no effect")]
    assert names
    with server.http() as http:
        for name in names:
            value = True if name == "spaces_between_special_tokens" else {"any": "thing"}
            answer = http.post(PATHS[route], json=MINIMAL[route] | {name: value})
            assert answer.status_code == 200, answer.text


def test_zero_is_not_false(server: Server) -> None:
    with server.http() as http:
        assert (
            error_of(http.post("/generate", json={"text": "a", "return_entropy": 0}), 400)["param"] == "return_entropy"
        )
