"""looptx from Python: load a model, generate with it, look at its loops.

    import looptx

    model = looptx.load()                       # or looptx.load("runs/a")
    for token in model.stream("Call me"):
        print(token.text, token.loops, token.confidence)

Everything else is in `looptx_core`. torch is imported by `load`, not by this module.
"""

from looptx_core import __version__
from looptx_core.api import Model, load
from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import LooptxError

__all__ = ["GenerationOptions", "LooptxError", "Model", "__version__", "load"]
