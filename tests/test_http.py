"""Over real HTTP with the `openai` client: a served checkpoint in the official format, from request to tokens and
back.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from baleen.llm import LLM
from baleen.messages import SamplingParams
from baleen.model.random_checkpoint import build_random_checkpoint
from tests.serving import Server, command_line, serve

CONTEXT = 1024
MODEL = "baleen-test"
FLAGS = ("--served-model-name", MODEL, "--context-length", str(CONTEXT), "--max-total-tokens", "16384")
MESSAGES: Any = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", size="tiny")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serve(checkpoint, *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def chat(client: openai.OpenAI, **settings: Any) -> Any:
    settings = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 8, **settings}
    extra = settings.pop("extra", {"ignore_eos": True})
    return client.chat.completions.create(**settings, extra_body=extra)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_chat_equals_the_offline_engine(client: openai.OpenAI, checkpoint: Path) -> None:
    """The same text through HTTP and through `LLM`: one path."""
    with LLM(str(checkpoint), context_length=CONTEXT, max_total_tokens=4096) as llm:
        expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True))
    answer = chat(client, max_tokens=40)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 40
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.total_tokens == expected.num_prompt_tokens + 40


def test_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=30)
    chunks = list(chat(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == ["length"]
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["one", "two"], max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 10)
    by_ids = client.completions.create(
        model=MODEL, prompt=[b + 3 for b in b"one"], max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    assert by_ids.choices[0].text == answer.choices[0].text


def test_stop_string(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=40).choices[0].message.content
    stop = whole[10:13]
    cut = whole[: whole.index(stop)]
    answer = chat(client, max_tokens=40, stop=[stop])
    assert answer.choices[0].message.content == cut
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    streamed = chat(client, max_tokens=40, stop=[stop], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == cut


def test_n_and_seed(client: openai.OpenAI) -> None:
    first = chat(client, n=3, temperature=1.0, seed=7, max_tokens=20)
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3, "the choices are copies"
    again = chat(client, n=3, temperature=1.0, seed=7, max_tokens=20)
    assert [c.message.content for c in again.choices] == texts
    other = chat(client, n=3, temperature=1.0, seed=8, max_tokens=20)
    assert [c.message.content for c in other.choices] != texts


def test_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 6
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 4
        assert tops == sorted(tops, reverse=True)
        assert entry.logprob == tops[0], "greedy takes the likeliest"
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob <= 0
    assert b"".join(bytes(e.bytes) for e in entries).decode("utf-8", "replace") == answer.choices[0].message.content


def test_penalties_and_top_k(client: openai.OpenAI) -> None:
    """top_k 1 is greedy at any temperature; a strong presence penalty forbids repeats that greedy has."""
    greedy = chat(client, max_tokens=30).choices[0].message.content
    extra = {"ignore_eos": True, "top_k": 1}
    assert chat(client, max_tokens=30, temperature=1.5, extra=extra).choices[0].message.content == greedy
    entries = chat(client, max_tokens=30, presence_penalty=2.0, frequency_penalty=2.0, logprobs=True)
    tokens = [tuple(e.bytes) for e in entries.choices[0].logprobs.content]
    plain = [tuple(e.bytes) for e in chat(client, max_tokens=30, logprobs=True).choices[0].logprobs.content]
    assert len(set(tokens)) > len(set(plain)) or len(set(plain)) == 30


def test_thinking_goes_to_the_reasoning(client: openai.OpenAI) -> None:
    """With thinking on the prompt ends in <think>, so a random model's text is all reasoning."""
    extra = {"ignore_eos": True, "chat_template_kwargs": {"thinking": True}}
    message = chat(client, max_tokens=10, extra=extra).choices[0].message
    assert message.reasoning_content
    assert not message.content


# ---- bad input -------------------------------------------------------------------------------------------------------

LONG = "x" * (CONTEXT + 10)
BAD: dict[str, tuple[str, dict[str, Any], int, str | None]] = {
    "no messages": ("chat", {"messages": []}, 400, "messages"),
    "messages missing": ("chat", {"messages": None}, 400, "messages"),
    "unknown role": ("chat", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages"),
    "temperature too high": ("chat", {"temperature": 3}, 400, "temperature"),
    "temperature is text": ("chat", {"temperature": "hot"}, 400, "temperature"),
    "top_p out of range": ("chat", {"top_p": 0}, 400, "top_p"),
    "top_k zero": ("chat", {"top_k": 0}, 400, "top_k"),
    "min_p out of range": ("chat", {"min_p": 2}, 400, "min_p"),
    "n is zero": ("chat", {"n": 0}, 400, "n"),
    "max_tokens negative": ("chat", {"max_tokens": -1}, 400, "max_tokens"),
    "max_tokens beyond the context": ("chat", {"max_tokens": CONTEXT + 1}, 400, "max_tokens"),
    "prompt longer than the context": ("chat", {"messages": [{"role": "user", "content": LONG}]}, 400, "messages"),
    "too many logprobs": ("chat", {"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs"),
    "presence_penalty out of range": ("chat", {"presence_penalty": 9}, 400, "presence_penalty"),
    "tool without a name": ("chat", {"tools": [{"type": "function", "function": {}}]}, 400, "tools"),
    "unknown model": ("chat", {"model": "gpt-9"}, 404, "model"),
    "empty prompt": ("completions", {"prompt": ""}, 400, "prompt"),
    "prompt of wrong type": ("completions", {"prompt": {"a": 1}}, 400, "prompt"),
    "id outside the vocabulary": ("completions", {"prompt": [10**6]}, 400, "prompt"),
    "prompt too long": ("completions", {"prompt": LONG}, 400, "prompt"),
    "completion beyond the context": ("completions", {"prompt": "x", "max_tokens": CONTEXT}, 400, "max_tokens"),
    "suffix": ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_field(server: Server, case: str) -> None:
    route, change, status, field = BAD[case]
    if route == "chat":
        path, body = "/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
    else:
        path, body = "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 4}
    for stream in (False, True):
        answer = httpx.post(server.url + path, json={**body, **change, "stream": stream})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        assert error["message"]
        assert field is not None
        assert str(error["param"]).split(".")[0].split("[")[0] == field, error


def test_broken_json_unknown_route_and_method(server: Server) -> None:
    for answer, status in (
        (
            httpx.post(f"{server.url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}),
            400,
        ),
        (httpx.get(f"{server.url}/v1/nothing"), 404),
        (httpx.get(f"{server.url}/v1/chat/completions"), 405),
        (httpx.get(f"{server.url}/v1/models/nothing"), 404),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


# ---- many and gone clients -------------------------------------------------------------------------------------------


def test_32_streams_at_once(server: Server) -> None:
    """Each gets the tokens it gets alone."""

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        prompts = [f"{i * 7919} is the prompt of stream {i}" * (i % 5 + 1) for i in range(32)]
        alone = [await one(client, prompt) for prompt in prompts]
        together = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
        assert list(together) == alone
        await client.close()

    asyncio.run(run())
    server.wait_for_metric("sglang:num_running_reqs", 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(server: Server, stream: bool) -> None:
    server.wait_for_metric("sglang:num_running_reqs", 0)
    aborted = server.metric("sglang:num_aborted_requests_total")
    body = {"model": MODEL, "prompt": "x" * 200, "max_tokens": 800, "ignore_eos": True, "stream": stream}
    gone = threading.Event()

    def leave() -> None:
        with httpx.Client(timeout=httpx.Timeout(60, read=0.5)) as http:
            try:
                with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                    for _ in response.iter_lines():
                        break
            except httpx.ReadTimeout:
                pass
        gone.set()

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join(30)
    assert gone.is_set()
    server.wait_for_metric("sglang:num_running_reqs", 0, seconds=5)
    server.wait_for_metric("sglang:token_usage", 0, seconds=5)
    assert server.metric("sglang:num_aborted_requests_total") == aborted + 1


def test_native_and_health_routes(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/generate",
        json={"text": "abc", "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}},
    ).json()
    assert answer["meta_info"]["completion_tokens"] == 4
    assert len(answer["output_ids"]) == 4
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/health_generate", timeout=30).status_code == 200
    info = httpx.get(f"{server.url}/server_info").json()
    assert info["served_model_name"] == MODEL
    assert info["context_length"] == CONTEXT
    models = httpx.get(f"{server.url}/v1/models").json()
    assert [m["id"] for m in models["data"]] == [MODEL]
    assert models["data"][0]["max_model_len"] == CONTEXT


# ---- the end ---------------------------------------------------------------------------------------------------------


def slow_stream(url: str, seen: list[str], num_tokens: int) -> None:
    """Reads a long stream to its end, whatever that is."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as http, http.stream("POST", f"{url}/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line:
                seen.append(line)


def engine_pid(server: Server) -> int:
    """The child that multiprocessing spawned, not its resource tracker."""
    for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split():
        if b"spawn_main" in command_line(pid):
            return int(pid)
    raise AssertionError("no engine process")


def test_sigterm_drains(checkpoint: Path) -> None:
    with serve(checkpoint, *FLAGS) as server:
        seen: list[str] = []
        thread = threading.Thread(target=slow_stream, args=(server.url, seen, 150))
        thread.start()
        while len(seen) < 3:
            time.sleep(0.01)
        engine = engine_pid(server)
        server.process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert seen[-1] == "data: [DONE]"
        assert json.loads(seen[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0
        assert not Path(f"/proc/{engine}").exists()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_dead_engine_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    """Killed: /health fails, the open stream ends with an error, the exit code is not 0; all within five seconds."""
    with serve(checkpoint, *FLAGS, log=tmp_path / "log") as server:
        seen: list[str] = []
        thread = threading.Thread(target=slow_stream, args=(server.url, seen, 900))
        thread.start()
        while len(seen) < 3:
            time.sleep(0.01)
        killed = time.monotonic()
        os.kill(engine_pid(server), signal.SIGKILL)
        thread.join(5)
        assert not thread.is_alive()
        assert "error" in json.loads(seen[-2].removeprefix("data: "))
        assert seen[-1] == "data: [DONE]"
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert server.process.wait(5) == 1
        assert time.monotonic() - killed < 5
        assert "SIGKILL" in (tmp_path / "log").read_text()


def test_an_unreadable_checkpoint_ends_the_server(checkpoint: Path, tmp_path: Path) -> None:
    """The loader's message reaches the user, with the tensor's name, and the exit code is not 0."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-100] if file.name.endswith("00001.safetensors") else data)
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    log = tmp_path / "log"
    with pytest.raises(AssertionError, match="ended with 1"), serve(broken, *FLAGS, log=log):
        pass
    assert "baleen: error" in log.read_text()
    assert shard.name in log.read_text()
    assert "Traceback" not in log.read_text()
