"""What text costs on one core: prompts to ids, ids to events, against transformers' tokenizer with its chat template.
Writes benchmarks/results/.

Run: python benchmarks/text_path.py   (half a minute)

The tokenizer is DeepSeek-V3.2's. No model runs: the answers are fixed, with reasoning, prose, code and tool calls, and
come one token at a time for all streams in turn, as from an engine. All runs in one thread, which never waits, and is
timed by the CPU's clock: what else runs on the machine hardly counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import baleen
from baleen.chat.conftest import real_tokenizer_json
from baleen.chat.conversation import Conversation
from baleen.chat.detokenizer import Detokenizer
from baleen.chat.encoding import encode
from baleen.chat.output_parser import OutputParser
from baleen.chat.template import Template
from baleen.chat.tokenizer import Tokenizer
from baleen.config import PUBLISHED
from baleen.flags import default_config
from baleen.messages import AbortRequest, EngineInput, GenerateRequest, TokenOutput
from baleen.server.app import create_app
from baleen.server.engine_client import EngineClient, OutputChannel

REPO = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
JINJA = REPO / "baleen" / "chat" / "deepseekv31.jinja"
STREAMS, ROUNDS = 64, 9
DSML = "｜DSML｜"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.replace('_', ' ').capitalize()} in the working tree.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "content": {"type": "string"}, "lines": {"type": "array"}},
                "required": ["path"],
            },
        },
    }
    for name in ("read_file", "write_file", "search")
]


# ---- what is said ----------------------------------------------------------------------------------------------------


def passages() -> list[str]:
    """Prose and code of this repository, 700 characters each, and some that is not English."""
    files = [
        REPO / "README.md",
        *sorted((REPO / "docs").glob("*.md")),
        *sorted((REPO / "baleen" / "chat").glob("[a-z]*.py")),
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in files).replace(DSML, "").replace("think>", "thought>")
    return [text[at : at + 700] for at in range(0, len(text) - 700, 700)]


def conversation(stream: int, texts: Sequence[str]) -> list[dict[str, Any]]:
    at = 5 * stream
    return [
        {"role": "system", "content": "You are a careful engineer. " + texts[at % len(texts)]},
        {"role": "user", "content": "What does this do?\n" + texts[(at + 1) % len(texts)]},
        {"role": "assistant", "content": texts[(at + 2) % len(texts)]},
        {"role": "user", "content": "Now rewrite it. 请用中文解释一下这段代码。\n" + texts[(at + 3) % len(texts)]},
    ]


def answer(stream: int, texts: Sequence[str]) -> str:
    at = 5 * stream
    code = texts[(at + 4) % len(texts)]
    return (
        f"The user wants it rewritten. {texts[(at + 1) % len(texts)][:300]}\n</think>这段代码把文本切成块。🙂 {code}"
        f"\n\n<{DSML}function_calls>\n"
        f'<{DSML}invoke name="write_file">\n<{DSML}parameter name="path" string="true">src/main.py</{DSML}parameter>\n'
        f'<{DSML}parameter name="content" string="true">{code}</{DSML}parameter>\n'
        f'<{DSML}parameter name="lines" string="false">[1, 2, {stream}]</{DSML}parameter>\n</{DSML}invoke>\n'
        f"</{DSML}function_calls>"
    )


# ---- timing ----------------------------------------------------------------------------------------------------------


def best(work: Callable[[], int]) -> tuple[float, int]:
    """(items per second of the fastest round, items of a round); `work` returns how many items it did."""
    times, items = [], 0
    for _ in range(ROUNDS):
        started = time.process_time()
        items = work()
        times.append(time.process_time() - started)
    return items / min(times), items


class Turns:
    """The answers, one token of each stream in turn."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.order = [
            (stream, token_id)
            for step in range(max(map(len, answers)))
            for stream, ids in enumerate(answers)
            for token_id in ids[step : step + 1]
        ]


def detokenized(tokenizer: Tokenizer, turns: Turns) -> int:
    streams = [Detokenizer(tokenizer, shown=tokenizer.mark_ids) for _ in range(STREAMS)]
    for stream, token_id in turns.order:
        streams[stream].push((token_id,))
    for one in streams:
        one.finish()
    return len(turns.order)


def parsed(tokenizer: Tokenizer, turns: Turns) -> int:
    names = [tool["function"]["name"] for tool in TOOLS]
    streams = [
        (
            Detokenizer(tokenizer, shown=tokenizer.mark_ids),
            OutputParser(tool_parser="deepseekv32", in_reasoning=True, functions=names),
        )
        for _ in range(STREAMS)
    ]
    for stream, token_id in turns.order:
        detokenizer, parser = streams[stream]
        parser.push(detokenizer.push((token_id,)))
    for detokenizer, parser in streams:
        parser.push(detokenizer.finish())
        parser.finish()
        assert parser.num_calls == 1
    return len(turns.order)


class Collector(transformers.TextStreamer):
    """transformers' own streaming, which prints, made to keep the text."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.texts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.texts.append(text)


def streamed_by_transformers(tokenizer: Any, turns: Turns) -> int:
    streams = [Collector(tokenizer) for _ in range(STREAMS)]
    tokens = {token_id: torch.tensor([token_id]) for _, token_id in turns.order}
    for stream, token_id in turns.order:
        streams[stream].put(tokens[token_id])
    for one in streams:
        one.end()
    return len(turns.order)


# ---- the API process -------------------------------------------------------------------------------------------------


class ScriptedEngine(EngineClient):
    """Stands where the socket to the engine does; `step` gives each open request its next token."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        super().__init__("inproc://none")
        self.ready.set()
        self._answers = answers
        self._running: dict[str, tuple[Sequence[int], int, OutputChannel]] = {}
        self._channel: OutputChannel | None = None
        self.num_started = 0

    def submit(self, requests: Sequence[GenerateRequest], channel: OutputChannel) -> None:
        self._channel = channel
        super().submit(requests, channel)

    def _send(self, message: EngineInput) -> None:
        assert not isinstance(message, AbortRequest)
        if isinstance(message, GenerateRequest):
            assert self._channel is not None
            self._running[message.rid] = (self._answers[self.num_started], 0, self._channel)
            self.num_started += 1

    def step(self) -> int:
        """The number of tokens given."""
        running, self._running = self._running, {}
        for rid, (ids, said, channel) in running.items():
            last = said + 1 == len(ids)
            output = TokenOutput(
                rid=rid,
                token_ids=(ids[said],),
                num_prompt_tokens=1000,
                num_cached_tokens=0,
                num_output_tokens=said + 1,
                finish_reason="length" if last else None,
            )
            self._pass_on(output)
            if not last:
                self._running[rid] = (ids, said + 1, channel)
        return len(running)


class Api:
    """The server's application without its sockets: requests go in as ASGI messages, events come out as bytes."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, bodies: Sequence[bytes], answers: Sequence[Sequence[int]]
    ) -> None:
        small = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "hidden_size": 256, "n_routed_experts": 16}
        (folder / "config.json").write_text(json.dumps(next(iter(PUBLISHED.values())) | small))
        self._config = default_config(folder, load_format="dummy", context_length=8192, max_total_tokens=2**20)
        self._tokenizer = tokenizer
        self._bodies = bodies
        self._answers = answers
        self.num_events = 0

    async def run(self) -> tuple[float, float]:
        """(seconds until all requests are with the engine, seconds for all their tokens)"""
        engine = ScriptedEngine(self._answers)
        app = create_app(self._config, engine, self._tokenizer)
        self.num_events = 0
        started = time.process_time()
        tasks = [asyncio.create_task(self._request(app, body)) for body in self._bodies]
        while engine.num_started < STREAMS:
            await asyncio.sleep(0)
        submitted = time.process_time()
        while engine.step():
            for _ in range(3):  # wake every reader, and let each finish its work
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return submitted - started, time.process_time() - submitted

    async def _request(self, app: Callable[..., Awaitable[None]], body: bytes) -> None:
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 200, message
            else:
                self.num_events += message["body"].count(b"data: ")

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await app(scope, receive, send)


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure(folder: Path) -> dict[str, Any]:
    (folder / "tokenizer.json").write_text(real_tokenizer_json(), encoding="utf-8")
    ours = Tokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=JINJA.read_text(encoding="utf-8"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
    )
    template = Template(JINJA.read_text(encoding="utf-8"), str(JINJA))
    texts = passages()
    messages = [conversation(stream, texts) for stream in range(STREAMS)]
    answers = [ours.encode(answer(stream, texts)) for stream in range(STREAMS)]
    turns = Turns(answers)

    def encode_with(render: Callable[[Conversation], Any]) -> int:
        return sum(len(ours.encode(render(Conversation(one, TOOLS, thinking=True)).text)) for one in messages)

    def encode_theirs() -> int:
        return sum(
            len(theirs.apply_chat_template(one, tools=TOOLS, add_generation_prompt=True, thinking=True)["input_ids"])
            for one in messages
        )

    result: dict[str, Any] = {
        "answer_tokens": len(turns.order),
        "prompt": {
            "baleen, V3.2 encoding": best(lambda: encode_with(encode)),
            "baleen, V3.1 template": best(lambda: encode_with(template.encode)),
            "transformers, V3.1 template": best(encode_theirs),
        },
        "stream": {
            "baleen: detokenise": best(lambda: detokenized(ours, turns)),
            "baleen: detokenise, parse": best(lambda: parsed(ours, turns)),
            "transformers: TextStreamer": best(lambda: streamed_by_transformers(theirs, turns)),
            "transformers: batch_decode, when all is there": best(
                lambda: len(turns.order) if theirs.batch_decode(answers) else 0
            ),
        },
    }
    body = {"model": "default", "tools": TOOLS, "stream": True, "chat_template_kwargs": {"thinking": True}}
    bodies = [json.dumps(body | {"messages": one}).encode() for one in messages]
    api = Api(folder, ours, bodies, answers)
    runs = [asyncio.run(api.run()) for _ in range(ROUNDS)]
    result["api"] = {
        "events": api.num_events,
        "requests_per_s": STREAMS / min(seconds for seconds, _ in runs),
        "tokens_per_s": len(turns.order) / min(seconds for _, seconds in runs),
    }
    return result


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        before = os.getloadavg()[0]
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "command": "python benchmarks/text_path.py",
            "cpu": f"{cpu_name()}, one core",
            "load": f"{before:.1f} before on {os.cpu_count()} cores",
            "versions": {
                "baleen": baleen.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
                "python": platform.python_version(),
            },
            **measure(Path(folder)),
        }
    write(result)


def write(result: dict[str, Any]) -> None:
    """The numbers as JSON, and as tables a person can read."""
    api = result["api"]
    lines = [
        f"# Text path on one core, {result['date']}",
        "",
        f"`{result['command']}` on {result['cpu']} (load {result['load']}); "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f". The tokenizer of DeepSeek-V3.2; {STREAMS} conversations with three tools."
        f" CPU seconds, fastest of {ROUNDS} rounds.",
        "",
        "## Conversation to ids",
        "",
        "| | prompt tokens | tokens/s |",
        "|---|---|---|",
        *(f"| {name} | {items} | {rate:,.0f} |" for name, (rate, items) in result["prompt"].items()),
        "",
        f"## Ids to text, {STREAMS} streams in turn, {result['answer_tokens']} tokens",
        "",
        "| | tokens/s |",
        "|---|---|",
        *(f"| {name} | {rate:,.0f} |" for name, (rate, _) in result["stream"].items()),
        f"| **baleen: the API process** | **{api['tokens_per_s']:,.0f}** |",
        "",
        "The answers are reasoning, prose, code and calls; TextStreamer splits no reasoning and reads no calls. The API"
        " process is all of the server but its sockets: outputs of the engine to detokenizer, stops, parser, counters,"
        f" JSON and server-sent events ({api['events']} of them) of {STREAMS} open HTTP requests on one event loop."
        f" Before that it took in {api['requests_per_s']:,.0f} requests/s: body, checks, conversation to ids.",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"text_path_{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
