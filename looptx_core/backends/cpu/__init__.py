"""Decoding on the CPU by a small compiled kernel: `decode.cpp`, compiled at the first use.

`bindings.py` describes a model to it, `backend.py` runs it for the engine. Without a compiler, and
wherever a model or a request needs more than the kernel knows, torch runs, with the same results.
"""
