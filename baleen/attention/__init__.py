"""DeepSeek Sparse Attention over the paged cache: store, select, attend.

batch.py      ForwardBatch: the ragged tokens of one step, as the attention sees them
kv_pool.py    the bytes of a page: latent rows and index keys, each layout in this one place
selection.py  index logits -> top-k positions
backend.py    AttentionBackend, what the model calls; the dict of attention kernels
absorbed.py   the absorbed form around a kernel: queries into the latent space, values out of it
reference.py  attention in torch: absorbed over the selected rows, or multi-head under the selection mask
masked.py     prefill over a short context on a GPU: multi-head under the selection mask
flashmla.py   attention by FlashMLA, on a Hopper GPU
triton.py     attention by our own kernels, on a GPU
over_rows.py  attention by a library's kernel over rows of the cache: all but the call
fa3.py, tilelang.py, trtllm.py, aiter.py  that call, for each library

May import config, messages and kernels. To add an attention kernel: one file with a class like
`reference.ReferenceAttention`, or a subclass of `over_rows.OverRows`; one line in `backend.ATTENTION`; what it runs on
in `device_choices.BACKENDS`; its name among the choices of the backend flags.
"""
