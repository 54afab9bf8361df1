"""A model of pictures and the one that went on from it to clips, averaged weight by weight.

    python -m benchmarks.video.average --before looptx_core/assets/picture-model --after RUN \
        --share 0.85 --out runs/averaged

What learns clips forgets some of its pictures. On the line between the weights before and after
lie models that do both (WiSE-FT, arXiv 2109.01903): `--share` is how far along, and what only the
later model has is taken whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.checkpoint.registry import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--share", type=float, default=0.85)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    before = load_model(resolve_model(flags.before).folder).model.state_dict()
    after = load_model(resolve_model(flags.after).folder)
    weights = {
        name: value if name not in before else value.lerp(before[name], 1 - flags.share)
        for name, value in after.model.state_dict().items()
    }
    after.model.load_state_dict(weights)
    save_model(flags.out, after.model, after.tokenizer, exit_settings=after.exit,
               facts=after.facts, special=after.special)  # fmt: skip


if __name__ == "__main__":
    main()
