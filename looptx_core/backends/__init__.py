"""Back ends: what runs a model's parts for the engine, chosen in `select.py`.

`base.py` says what a back end is; `torch_backend.py` runs anywhere and is the reference,
`cuda_graphs.py` replays recorded kernels on a GPU, and `cpu/` is a compiled kernel.
"""
