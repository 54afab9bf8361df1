"""The model of speech that ships hears its sample, and writes nothing where nothing is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from looptx_core.api import Model, load
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.generation.engine import MediaPrompt
from looptx_core.media.audio.augment import noise
from looptx_core.media.audio.features import RATE
from looptx_core.media.audio.read import item_of

HELLO = Path(__file__).parent.parent / "examples" / "hello.wav"


@pytest.fixture(scope="module")
def model() -> Model:
    return load(bundled_model("sound-model"))


def heard(model: Model, samples: np.ndarray) -> str:
    prompt = MediaPrompt("", (item_of(samples.astype(np.float32)),))
    return model.generate(prompt, temperature=0.0).text


def test_the_sample_is_heard(model: Model) -> None:
    (segment,) = model.transcribe(HELLO, temperature=0.0)
    assert segment.text == "hello world"


@pytest.mark.parametrize("level", [0.0, 0.003, 0.1])
def test_silence_and_noise_say_nothing(model: Model, level: float) -> None:
    draw = np.random.default_rng(0)
    for seconds in (1, 3):
        assert heard(model, noise(seconds * RATE, draw) * level) == ""
