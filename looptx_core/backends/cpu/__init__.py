"""Decoding on the CPU by a small compiled kernel: `decode.cpp`, compiled at the first use.

Its products of weights are in `products.h`, over the vectors of `vectors.h` and the matrix tiles of
`amx.h`, and its threads in `pool.h`.

`bindings.py` describes a model to it, `backend.py` runs it for the engine. Without a compiler, and
wherever a model or a request needs more than the kernel knows, torch runs, with the same results.
"""
