"""Logits to token ids: `Sampler` turns the last logits of each request into its next token.

    sampler.py     per-slot parameters and the pipeline: penalties, temperature, filters, draw
    penalties.py   which tokens each slot has seen, and what that costs them
    token_bias.py  logit_bias and min_new_tokens
    filters.py     top-k, top-p and min-p on exact integer weights
    noise.py       random numbers as a function of (seed, position, token id)
    logprobs.py    log-probabilities for the requests that asked
    grammar.py     the mask of each slot that has a grammar, worked out while the model runs
    grammar_compiler.py, grammar_text.py, json_schema.py, patterns.py
                   what a request asked for -> xgrammar's compiled grammar, or an error that says where; xgrammar takes
                   a second to import, so it is imported with the first grammar

May import config, messages, kernels. What a row gives depends on its own logits, parameters, seed and position, and on
no other row of the batch: a new step of the pipeline must keep that
(`test_sampler.py::test_rows_do_not_depend_on_their_batch`).

To add a kind of grammar: its name in `messages.Grammar`, a method in `grammar_text._READERS`. To let more JSON schemas
pass: `json_schema.py`, and a line in its test with texts that are instances and texts that are not.

To add a sampling parameter: a field of `messages.SamplingParams`, a column of the sampler's state, its step in
`Sampler._draw` or `penalties.py`, and its line in `test_sampler.py::naive_probabilities`, the slow definition.
"""
