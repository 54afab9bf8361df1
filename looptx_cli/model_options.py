"""The options of the commands that run a model, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        envvar="LOOPTX_MODEL",
        help="A run, a model folder or hf:OWNER/NAME; absent: the newest run.",
    ),
]
Adapter = Annotated[
    str | None, typer.Option(help="An adapter, or the run that made it, on its own base.")
]
Image = Annotated[
    list[Path] | None,
    typer.Option(help="A picture, before the prompt or at its <|image|>; may be repeated."),
]
Audio = Annotated[
    list[Path] | None,
    typer.Option(help="A recording, before the prompt or at its <|audio|>; may be repeated."),
]
Video = Annotated[
    list[Path] | None,
    typer.Option(help="A clip, before the prompt or at its <|video|>; may be repeated."),
]
ShowIterations = Annotated[
    bool, typer.Option("--show-iterations", help="Show each token's loops and confidence.")
]
Attention = Annotated[str, typer.Option(help="auto, sdpa, flash or explicit.")]
Precision = Annotated[str, typer.Option(help="float32, bf16, or int8 (weights; on a CPU).")]
Kernel = Annotated[
    str,
    typer.Option(help="auto, native (compiled, on a CPU), graph (recorded, on a GPU) or torch."),
]
Config = Annotated[Path | None, typer.Option(help="A YAML file of these settings.")]
