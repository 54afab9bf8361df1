"""An encoder of pictures learns motion, before the decoder learns to tell it.

    python -m benchmarks.video.motion --model looptx_core/assets/picture-model --out FOLDER \
        [--steps 1400]

On clips alone a decoder of one layer says "left" or "right" at random of a thing that turns, for
more than 25,000 clips: that the encoder could help reaches it too weakly. Here a linear layer on
the mean of each tubelet names one of the eight motions, and is thrown away afterwards. On pictures
the encoder keeps to what it was, by the distance of its outputs (learning without forgetting, arXiv
1606.09282). `benchmarks/video/model.yaml` goes on from the folder.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pictures.emoji import fetch_emoji
from benchmarks.video.moving import FOLDER, MOTIONS
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.checkpoint.registry import resolve_model
from looptx_core.config.model import ModelConfig
from looptx_core.media.batch import MediaItem, batch_items
from looptx_core.media.image.encoder import VisionEncoder
from looptx_core.media.registry import MEDIA
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.start import copy_weights

FRAMES, PATCHES = 8, 16
HELD_OUT = 400
"""Clips at the end of the file, of names of their own."""


def clips_of(config: ModelConfig) -> tuple[list[MediaItem], Tensor]:
    """All clips to train on, a byte for each number, and the place of each one's motion."""
    found, motions = [], []
    for line in (FOLDER / "motions.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        item = MEDIA["video"].read(FOLDER / record["video"], config)
        pixels = ((item.features + 1) * 127.5).round().to(torch.uint8)
        found.append(item._replace(features=pixels))
        motions.append(MOTIONS.index(record["text"].removeprefix("it ")))
    return found, torch.tensor(motions)


def motion_scores(encoder: VisionEncoder, head: nn.Linear, clips: list[MediaItem]) -> Tensor:
    """(clips, motions)."""
    items = [clip._replace(features=clip.features.float() / 127.5 - 1) for clip in clips]
    rows = encoder(batch_items(items)["video"])
    return head(rows.view(len(clips), FRAMES // 2, PATCHES, -1).mean(2).flatten(1))


def teach(
    encoder: VisionEncoder, before: VisionEncoder, config: ModelConfig, args: argparse.Namespace
) -> None:
    clips, motions = clips_of(config)
    pictures = [
        fetch_emoji() / json.loads(line)["image"]
        for line in (fetch_emoji() / "train.jsonl").read_text("utf-8").splitlines()
    ]
    head = nn.Linear(FRAMES // 2 * config.d_model, len(MOTIONS))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=args.lr)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    rng, began = np.random.default_rng(0), time.monotonic()
    pairs = (len(clips) - HELD_OUT) // 2
    kept: list[Tensor] = []
    for step in range(1, args.steps + 1):
        first = 2 * rng.choice(pairs, args.batch // 2, replace=False)
        chosen = np.stack([first, first + 1], 1).flatten().tolist()  # a clip and its reverse
        seen = [
            MEDIA["image"].read(pictures[n], config, augment=rng)
            for n in rng.choice(len(pictures), args.batch // 2)
        ]
        stills = batch_items(seen)["image"]
        with torch.autocast("cpu", torch.bfloat16):
            scores = motion_scores(encoder, head, [clips[n] for n in chosen])
            with torch.no_grad():
                wanted = before(stills).float()
            moved = F.mse_loss(encoder(stills).float(), wanted) / wanted.var()
        loss = F.cross_entropy(scores.float(), motions[chosen])
        optimizer.zero_grad()
        (loss + args.keep * moved).backward()
        optimizer.step()
        rates.step()
        kept.append(torch.stack([loss.detach(), moved.detach()]))
        if step % 100 == 0 or step == args.steps:
            right = []
            for start in range(len(clips) - HELD_OUT, len(clips), 50):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    found = motion_scores(encoder, head, clips[start : start + 50]).argmax(1)
                right.append((found == motions[start : start + 50]).float())
            nats, far = torch.stack(kept[-100:]).mean(0).tolist()
            print(f"step {step}: {nats:.3f} nats, pictures moved by {far:.4f} of their variance, "
                  f"motions right {torch.cat(right).mean():.3f}, {time.monotonic() - began:.0f} s",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--keep", type=float, default=4.0, help="Weight of what pictures lose.")
    args = parser.parse_args()
    torch.manual_seed(0)
    start = load_model(resolve_model(args.model).folder, dtype=torch.float32)
    video = replace(start.config.video, frames=FRAMES, max_patches=PATCHES)
    config = replace(start.config, video=video)
    model = LoopedTransformer(config)
    copy_weights(model, start)
    before = cast(VisionEncoder, start.model.encoders()["image"])
    encoder = cast(VisionEncoder, model.encoders()["video"])
    teach(encoder, before, config, args)
    save_model(args.out, model.eval(), start.tokenizer, exit_settings=start.exit,
               facts=start.facts, special=start.special)  # fmt: skip


if __name__ == "__main__":
    main()
