"""Tool calls: known tools and tools with names and parameters put together at random, results, final answers."""

# ruff: noqa: E501
from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.tiny.data.conversation import Conversation
from recipes.tiny.data.small_talk import chat
from recipes.tiny.data.words import (
    CITIES,
    COLOURS,
    DAYS,
    ITEMS,
    NAMES,
    WORDS,
    answer_turn,
    fillers,
    made_up_name,
    of_split,
    spoken,
    system_turn,
)

# (name, type, what it is, maker)
Parameter = tuple[str, str, str, Callable[[random.Random], Any]]


@dataclass
class Tool:
    name: str
    description: str
    parameters: list[Parameter]
    requests: Sequence[str]
    result: Callable[[random.Random, dict[str, Any]], dict[str, Any]]
    answer: str

    def spec(self) -> dict[str, Any]:
        properties = {name: {"type": kind, "description": text} for name, kind, text, _ in self.parameters}
        for entry in properties.values():
            if entry["type"] == "array":
                entry["items"] = {"type": "string"}  # type: ignore[assignment]
        return {
            "name": self.name, "description": self.description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        }  # fmt: skip


KNOWN_TOOLS = (
    Tool("get_weather", "Get the weather of a city", [("city", "string", "Name of the city", lambda r: r.choice(CITIES))],
         ("What is the weather in {city}?", "How is the weather in {city} today?", "Tell me the weather in {city}."),
         lambda r, a: {"weather": r.choice(("sunny", "cloudy", "rainy", "windy")), "temperature": r.randint(-5, 35)},
         "In {city} it is {weather} with {temperature} degrees."),
    Tool("get_time", "Get the local time of a city", [("city", "string", "Name of the city", lambda r: r.choice(CITIES))],
         ("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city} now?"),
         lambda r, a: {"time": f"{r.randrange(24)}:{r.randrange(60):02}"}, "In {city} it is {time}."),
    Tool("calculate", "Calculate with two numbers", [
            ("operation", "string", "add, subtract or multiply", lambda r: r.choice(("add", "subtract", "multiply"))),
            ("a", "integer", "First number", lambda r: r.randint(1, 99999)),
            ("b", "integer", "Second number", lambda r: r.randint(1, 99999))],
         ("Use the calculator to {operation} {a} and {b}.", "Please {operation} {a} and {b} with the tool."),
         lambda r, a: {"result": {"add": a["a"] + a["b"], "subtract": a["a"] - a["b"],
                                  "multiply": a["a"] * a["b"]}[a["operation"]]},
         "The result is {result}."),
    Tool("convert_currency", "Convert an amount of money", [
            ("amount", "number", "Amount of money", lambda r: r.choice((r.randint(1, 9999), r.randint(1, 999) + 0.5))),
            ("source", "string", "Currency to convert from", lambda r: r.choice(("USD", "EUR", "GBP", "JPY", "CHF"))),
            ("target", "string", "Currency to convert to", lambda r: r.choice(("SEK", "CNY", "INR", "BRL", "CAD")))],
         ("How much is {amount} {source} in {target}?", "Convert {amount} {source} to {target}."),
         lambda r, a: {"value": r.randint(1, 99999)}, "{amount} {source} are {value} {target}."),
    Tool("send_email", "Send an email", [
            ("to", "string", "Email address", lambda r: f"{made_up_name(r).lower()}@{made_up_name(r).lower()}.org"),
            ("subject", "string", "Subject of the email", lambda r: " ".join(r.sample(WORDS, 2))),
            ("body", "string", "Text of the email", lambda r: r.choice(fillers()))],
         ("Send an email to {to} with the subject \"{subject}\" and the text \"{body}\"",
          "Please write to {to}. Subject: \"{subject}\". Text: \"{body}\""),
         lambda r, a: {"status": "sent"}, "The email to {to} was {status}."),
    Tool("set_alarm", "Set an alarm", [("hour", "integer", "Hour, 0 to 23", lambda r: r.randrange(24)),
                                       ("minute", "integer", "Minute, 0 to 59", lambda r: r.randrange(60))],
         ("Set an alarm at hour {hour} and minute {minute}.", "Wake me up at hour {hour}, minute {minute}."),
         lambda r, a: {"status": "set"}, "The alarm is {status}."),
    Tool("add_to_list", "Add things to the shopping list", [
            ("items", "array", "What to add", lambda r: r.sample(ITEMS, r.randint(1, 4)))],
         ("Put {items} on my shopping list.", "Add {items} to the list."),
         lambda r, a: {"length": r.randint(1, 20)}, "Done. The list has {length} entries now."),
    Tool("find_user", "Find the id of a user", [("name", "string", "Name of the user", lambda r: f"{r.choice(NAMES)} {made_up_name(r)}")],
         ("What is the user id of {name}?", "Find the user {name}."),
         lambda r, a: {"user_id": r.randint(1000, 99999)}, "{name} has the user id {user_id}."),
    Tool("set_light", "Switch a light", [("room", "string", "Name of the room", lambda r: r.choice(("kitchen", "hall", "bathroom", "office", "garage"))),
                                         ("on", "boolean", "true: on, false: off", lambda r: r.random() < 0.5)],
         ("Set the light in the {room} to {on}.", "Light in the {room}: {on}."),
         lambda r, a: {"status": "ok"}, "The light in the {room} is set."),
    Tool("get_stock", "Count the stock of an item", [("item", "string", "Name of the item", lambda r: r.choice(ITEMS))],
         ("How many {item} are in stock?", "Check the stock of {item}."),
         lambda r, a: {"stock": r.randint(0, 999)}, "There are {stock} {item} in stock."),
)  # fmt: skip
VERBS = [
    "get", "set", "create", "update", "delete", "check", "find", "open", "close", "start", "stop", "book", "order",
    "list", "move", "share",
]  # fmt: skip
NOUNS = [
    "ticket", "order", "room", "flight", "hotel", "meeting", "invoice", "report", "task", "note", "song",
    "playlist", "recipe", "parcel", "sensor", "door", "window", "printer", "camera", "device", "account",
    "customer", "product", "event", "reminder", "contract", "train", "table", "machine", "project",
]  # fmt: skip
PARAMETERS: tuple[Parameter, ...] = (
    ("id", "integer", "Number of the {n}", lambda r: r.randint(1, 99999)),
    ("name", "string", "Name of the {n}", lambda r: made_up_name(r)),
    ("city", "string", "City of the {n}", lambda r: r.choice(CITIES)),
    ("colour", "string", "Colour of the {n}", lambda r: r.choice(COLOURS)),
    ("owner", "string", "Owner of the {n}", lambda r: r.choice(NAMES)),
    ("count", "integer", "How many", lambda r: r.randint(1, 99)),
    ("code", "string", "Code of the {n}", lambda r: f"{r.choice('ABCDEF')}{r.randint(100, 9999)}"),
    ("day", "string", "Day of the week", lambda r: r.choice(DAYS)),
    ("urgent", "boolean", "Whether it is urgent", lambda r: r.random() < 0.5),
    ("price", "number", "Price in dollars", lambda r: r.randint(1, 999) + r.choice((0.5, 0.25))),
    ("tags", "array", "Words about the {n}", lambda r: r.sample(WORDS, r.randint(1, 3))),
    ("level", "integer", "Level from 1 to 10", lambda r: r.randint(1, 10)),
)


def _made_tool(rng: random.Random, split: str) -> Tool:
    """A tool with a name and parameters put together at random."""
    verb, noun, chosen = of_split(
        rng, split, 8,
        lambda: (rng.choice(VERBS), rng.choice(NOUNS), tuple(rng.sample(range(len(PARAMETERS)), rng.randint(1, 4)))),
    )  # fmt: skip
    parameters = [(n, k, text.format(n=noun), make) for n, k, text, make in (PARAMETERS[i] for i in chosen)]
    wishes = ", ".join(f"{n} {{{n}}}" for n, *_ in parameters)
    return Tool(
        f"{verb}_{noun}", f"{verb.capitalize()} a {noun}", parameters,
        (f"Please {verb} the {noun} with {wishes}.", f"{verb.capitalize()} a {noun}: {wishes}.",
         f"I want to {verb} a {noun} ({wishes})."),
        lambda r, a: r.choice(({"status": "ok"}, {"status": "done", "id": r.randint(1, 9999)}, {"status": "failed"})),
        f"I tried to {verb} the {noun}. The status is {{status}}.",
    )  # fmt: skip


def _tool(rng: random.Random, split: str) -> Tool:
    return rng.choice(KNOWN_TOOLS) if split == "train" and rng.random() < 0.35 else _made_tool(rng, split)


def tools(rng: random.Random, split: str, length: int) -> Conversation:
    count = rng.choice((1, 1, 2, 2, 3, 4))
    offered: dict[str, Tool] = {}
    while len(offered) < count:
        tool = _tool(rng, split)
        offered[tool.name] = tool
    specs = [tool.spec() for tool in offered.values()]
    thinking = rng.random() < 0.5
    messages = system_turn(rng)
    if split == "train" and rng.random() < 0.08:  # nothing to call
        talk = chat(rng, split, length)
        turn = talk.messages[-2:]
        return Conversation("tools", [*messages, *turn], [], thinking, specs)
    rounds = 1 if rng.random() < 0.8 else 2
    first: list[dict[str, Any]] = []
    asked = -1
    for _ in range(rounds):
        calls, wishes, results, answers = [], [], [], []
        for _ in range(1 if rng.random() < 0.65 else 2):
            tool = rng.choice(list(offered.values()))
            arguments = {name: make(rng) for name, _, _, make in tool.parameters}
            said = {name: spoken(value) for name, value in arguments.items()}
            wishes.append(rng.choice(tool.requests).format(**said))
            result = tool.result(rng, arguments)
            calls.append({"name": tool.name, "arguments": arguments})
            results.append({"role": "tool", "content": json.dumps(result)})
            answers.append(tool.answer.format(**said, **result) if set(result).isdisjoint(said) else
                           tool.answer.format(**{**said, **result}))  # fmt: skip
        joiner = rng.choice((" ", " Then: ", " Also: ", "\n"))
        names = " and ".join(call["name"] for call in calls)
        call_turn = answer_turn(f"I need to call {names}.", "")
        call_turn["tool_calls"] = calls
        messages.append({"role": "user", "content": joiner.join(wishes)})
        if asked < 0:
            asked, first = len(messages), calls
        messages += [call_turn, *results, answer_turn("I have the result and answer.", " ".join(answers))]
    return Conversation("tools", messages, first, thinking, specs, asked=asked)
