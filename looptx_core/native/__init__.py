"""Decoding on the CPU by a small compiled kernel: `decode.cpp`, compiled at the first use.

Without a compiler, and wherever a model or a request needs more than the kernel knows, the engine
takes the model itself, whose results are the same. `model.py` calls it.
"""
