"""The looped transformer. Start with `loop.py`.

The model knows tensors and its own configuration; files, trainers and terminals are elsewhere.
"""
