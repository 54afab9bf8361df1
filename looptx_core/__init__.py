"""looptx_core: looped transformers as a library (model, data, training, generation)."""

__version__ = "0.1.0"
