"""A ScheduledBatch -> tokens on one rank.

inputs.py        request slots (page tables, last ids) and the tensors of a step; the only host-to-device copies
model_runner.py  owns model, KV pool, backend and sampler; `execute(batch) -> StepOutput`

May import config, messages, model, attention, sampling and kernels.
"""
