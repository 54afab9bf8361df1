"""The medium of sound: what the rest of the package asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from looptx_core.media.base import Chunk, Encoded, FolderMedium, Grid, Source
from looptx_core.media.writer import Writer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from looptx_core.config.model import ModelConfig
    from looptx_core.media.batch import MediaBatch, MediaItem

DEFAULT_LAYERS = 4
"""Blocks of the encoder that a model gets when its data has recordings and nothing else is said."""
_BLANK = 0.05
"""The share of recordings that training replaces by silence or noise without a text: else a model
invents words where nothing is said, as Whisper does (arXiv 2402.08021)."""
_LAST_WEIGHT = 1 / 3
"""Of CTC at the end of a training, as a share of the first."""


class Audio(FolderMedium):
    """Recordings at 16 kHz, 80 ms a token, in one row of time on every axis."""

    name, noun, plural = "audio", "recording", "recordings"
    marker, ability = "<|audio|>", "hearing"
    write_key, write_ability, unasked = "speak", "speaking", False
    part = "input_audio"
    suffixes = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".m4a")
    grid_names = ("tokens",)
    encoder_name = "hearing"
    size_key = "model.audio.layers"
    labelled = True

    def enabled(self, settings: Mapping[str, Any]) -> bool:
        section = settings.get("audio") or {}
        layers = section.get("layers", 0) if isinstance(section, Mapping) else section.layers
        return layers > 0

    def enable(self, config: ModelConfig) -> ModelConfig:
        return replace(config, audio=replace(config.audio, layers=DEFAULT_LAYERS))

    def section(self, config: ModelConfig) -> Mapping[str, Any]:
        return vars(config.audio)

    def token(self, config: ModelConfig) -> int:
        return config.audio.token

    def describe(self, config: ModelConfig) -> str:
        return f"an encoder of {config.audio.layers} blocks"

    def files(self, config: ModelConfig) -> dict[str, Any]:
        from looptx_core.media.audio.features import FRAMES, HOP, MELS, RATE

        return {
            "preprocessor_config.json": {
                "feature_extractor_type": "LooptxFeatureExtractor",
                "feature_size": MELS,
                "sampling_rate": RATE,
                "hop_length": HOP,
                "n_fft": 400,
                "frames_per_token": FRAMES,
                "max_seconds": config.audio.max_seconds,
            }
        }

    def measure(self, source: Source, config: ModelConfig, where: str | None = None) -> Grid:
        return self.module("read").measure(source, config, where)

    def read(
        self,
        source: Source,
        config: ModelConfig,
        where: str | None = None,
        augment: Any = None,
    ) -> MediaItem:
        return self.module("read").read_recording(source, config, where, augment)

    def pieces(
        self, source: Source, config: ModelConfig, where: str | None = None
    ) -> Iterator[Chunk]:
        return self.module("read").pieces(source, config, where)

    def longest(self, grid: Grid) -> int:
        """At the slowest speed."""
        return int(grid[0] / self.module("augment").SLOWEST) + 1

    def blank(self, grid: Grid, config: ModelConfig, draw: Any) -> MediaItem | None:
        if draw.random() >= _BLANK:
            return None
        from looptx_core.media.audio.features import STEP

        return self.module("read").item_of(self.module("augment").quiet(grid[0] * STEP, draw))

    def groups(self, grid: Grid, config: ModelConfig) -> Tensor | None:
        import torch

        if config.audio.attention == "causal":
            return None
        return torch.zeros(self.length(grid), dtype=torch.long)

    def encoder(self, config: ModelConfig) -> nn.Module:
        from looptx_core.media.audio.encoder import AudioEncoder

        return AudioEncoder(config)

    def encode(self, encoder: nn.Module, batch: MediaBatch) -> Encoded:
        return encoder(batch, with_loss=encoder.training)

    def label(self, text: str, grid: Grid) -> Tensor | None:
        """The bytes of the text in lower case."""
        import torch

        from looptx_core.media.audio.encoder import ROWS, frames_needed

        label = torch.tensor(list(text.strip().lower().encode()), dtype=torch.long)
        return label if frames_needed(label) <= ROWS * grid[0] else None

    def loss_weight(self, config: ModelConfig, progress: float) -> float:
        falls = 1 - (1 - _LAST_WEIGHT) * min(1.0, max(0.0, progress))
        return config.audio.ctc_weight * falls

    def layers(self, config: ModelConfig) -> int:
        return config.audio.layers

    def flops(self, config: ModelConfig) -> int:
        """Of one token, two rows of the blocks, in a recording of ten seconds."""
        width, rows = config.audio.width, 2 * 125
        block = 2 * 2 * (4 * width**2 + 9 * width**2 + 2 * rows * width)
        stem = 2 * 3 * (4 * 80 * width + 2 * width**2)
        ends = 2 * 2 * width * (config.d_model + (257 if config.audio.ctc_weight else 0))
        return config.audio.layers * block + stem + ends

    def writes(self, settings: Mapping[str, Any]) -> bool:
        speak = settings.get("speak") or {}
        return bool(speak.get("codec") if isinstance(speak, Mapping) else speak.codec)

    def codes(self, config: ModelConfig) -> int:
        return config.speak.codes

    def with_codes(self, config: ModelConfig, first: int) -> ModelConfig:
        size = max(config.vocab_size, first + config.speak.codes)
        return replace(config, vocab_size=size, speak=replace(config.speak, first_code=first))

    def writer(self, config: ModelConfig) -> Writer | None:
        return self.module("speak").Speaking(config) if config.speak.codec else None
