"""HTTP: OpenAI's and the native routes, over an engine in another process.

app.py               the routes and the application        openapi.py  their description
operations.py        health, models, server info, flush, abort: routes that generate nothing
middleware.py        before every handler: API key, body size, cross-origin rules, counting
chat_completions.py  /v1/chat/completions        completions.py  /v1/completions        native.py  /generate
responses.py         /v1/responses               anthropic_messages.py  /v1/messages
protocol.py          OpenAI's JSON, in and out: nothing else knows it
generation.py        one HTTP request's sequences: submitted, turned to text, stopped, counted
stream.py            server-sent events, and noticing that the client has gone
engine_client.py     the socket to the engine
shared_counters.py   numbers that all API processes add to
errors.py            the one shape of every 4xx and 5xx
metrics.py           what /metrics shows

May import: config, messages, chat. Never torch. Pydantic and FastAPI are used here only.

To add a route: a handler `async (request) -> Response` beside its kin, a line in `app.ROUTES`, one in
`openapi.OPERATIONS`. A field that is known but not built goes into the `refused` table of its request model, so that it
is refused by name, never ignored.
"""
