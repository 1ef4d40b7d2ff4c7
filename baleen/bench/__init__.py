"""Speed without a server: `baleen bench`.

batch.py  one static batch through the runner: prefill, then decode steps

May import config, flags, messages and runner. Uses no tokenizer, sockets or HTTP.
"""
