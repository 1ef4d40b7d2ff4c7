"""Text on both sides of the engine: messages -> prompt -> ids, and ids -> text -> reasoning and content.

encoding.py       the DeepSeek-V3.2 prompt format: messages -> one string
tokenizer.py      string <-> ids, over the checkpoint's tokenizer.json
detokenizer.py    ids -> text as they arrive: whole characters only, stop strings matched and cut
output_parser.py  text -> (reasoning, content) as it arrives

May import: config, messages. Never torch, never the server: `baleen.LLM` uses this folder without HTTP.

To add a part of the prompt format (tools, results): a renderer in `encoding.RENDERERS`. To add a part of the output
format: a parser with `push` and `finish` as `output_parser.ThinkSplitter` has, and a field in `output_parser.Delta`.
"""
