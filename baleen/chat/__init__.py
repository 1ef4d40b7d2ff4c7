"""Text on both sides of the engine: messages -> prompt -> ids, and ids -> text -> reasoning, content and tool calls.

conversation.py   messages as clients send them -> checked ones, in the one form that all formats read
encoding.py       the DeepSeek-V3.2 prompt format: checked messages -> one string
template.py       other formats, as Jinja templates; deepseekv31.jinja is V3.1's and V3.2-Exp's
format.py         the format of the served model, for every route
tokenizer.py      string <-> ids, over the checkpoint's tokenizer.json
detokenizer.py    ids -> text as they arrive: whole characters only, cut at the first stop string or stop_regex
output_parser.py  text -> reasoning, content and tool calls as it arrives; docs/output_parsing.md has the rules
call_formats.py   the tags of tool calls, of V3.2 and of V3.1
partial_json.py   JSON that arrives in pieces

May import: config, messages, checkpoint_variant. Never torch, never the server: `baleen.LLM` uses this folder without
HTTP.

To add a chat format: a template beside `deepseekv31.jinja`, its name in `checkpoint_variant.BUILT_IN` and in
`format._NAMES`, and conversations with their texts, worked out by hand, as in `test_template.py`.
To add a format of tool calls, if it is tags around names, parameters and JSON: an entry in `call_formats.CALL_FORMATS`,
and its rows in the table of docs/output_parsing.md, which are its tests.
"""
