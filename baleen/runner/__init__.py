"""A ScheduledBatch -> tokens on one rank.

inputs.py         request slots (page tables, last ids) and the tensors of a step
decode_graphs.py  CUDA graphs of the decode step
warm_up.py        what is compiled and captured before the first request
compile_ahead.py  the first start on a GPU: several processes compile that
measurement.py    for benchmarks: what the device did in a step, a cache filled with random data
model_runner.py   owns model, KV pool, backend, sampler and grammar masks; `execute(batch).wait() -> StepOutput`

May import config, messages, memory_plan, model, attention, sampling and kernels.
"""
