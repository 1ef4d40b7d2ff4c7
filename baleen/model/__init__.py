"""DeepSeek-V3.2 as if on one device, and how its checkpoint gets into memory.

deepseek_v32.py       DeepseekV32ForCausalLM, decoder layer, MTP layer: the network top to bottom
mla.py                MLA projections and the call into the attention backend
indexer.py            lightning indexer: queries, keys, head gates
moe.py                router, routed and shared experts, dense MLP
layers.py              Linear with or without FP8 activations, RMSNorm, Embedding
weights.py            `Target`, where a checkpoint tensor goes; safetensors -> the targets, slice by slice
shards.py             safetensors headers, index and mapped files; writing shards
quant.py              the checkpoint formats; conversion between them
random_checkpoint.py  a small random checkpoint in the official format

May import config, attention and kernels. Parameters are named as in the checkpoint: a module yields a `Target` for each
tensor it takes, and fused buffers (q_a | kv_a | wk; gate | up; all experts) give out views of themselves.
"""
