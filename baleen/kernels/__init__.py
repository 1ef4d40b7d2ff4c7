"""The operations of the network that deserve more than one implementation, one folder per op.

What lives here. `<op>/__init__.py` is the op's contract (a docstring per public function), the list `IMPLEMENTATIONS`
and the public functions, which dispatch; `<op>/reference.py` is torch, defines the op, and is what a CPU serves with;
`<op>/cases.py` lists inputs with their tolerance, for correctness and for speed; `<op>/test_<op>.py` holds every
implementation to an oracle on those cases. `dispatch.py` loads implementations and holds the one choice of the process,
`testing.py` compares them. `compile_cache.py` knows whether all that is compiled is on disk.

Imports. Torch and baleen.kernels, nothing else of baleen: the folder could be lifted out as a library.

To add an implementation: a file `<op>/<name>_kernel.py` that defines the functions of `reference.py` it replaces, with
the same arguments, and one entry in that folder's `IMPLEMENTATIONS`, before those it should be preferred to. The tests
find it there. What it does not define stays with the reference.
To add an op: a folder with the four files above.

Letters: T query tokens, S cached tokens, G requests, Q query tokens of one request, H heads, D head dim, E experts,
K top-k or the inner dim of a product, N rows of a weight, P pages. 'Rounding' of an error means fp32 rounding, whatever
the order of summation.
"""
