"""Speed without a server: `baleen bench`.

batch.py  one static batch through the runner: prefill, then decode steps
trace.py  the kernels of a step, in order, with the pauses between them, as text

May import config, flags, messages and runner. Uses no tokenizer, sockets or HTTP.
"""
