"""DeepSeek Sparse Attention over the paged cache: store, select, attend.

batch.py      ForwardBatch: the ragged tokens of one step, as the attention sees them
kv_pool.py    the bytes of a page: latent rows and index keys, each layout in this one place
selection.py  index logits -> top-k positions
backend.py    AttentionBackend, what the model calls; the dict of attention kernels
absorbed.py   the absorbed form around a kernel: queries into the latent space, values out of it
reference.py  attention in torch: absorbed over the selected rows, or multi-head under the selection mask
flashmla.py   attention by FlashMLA, on a Hopper GPU

May import config, messages and kernels. To add an attention kernel: one file with a class like
`reference.ReferenceAttention`, one line in `backend.ATTENTION`, its name among the choices of the backend flags.
"""
