"""Clips: frames by their time within limits, tubelets, and states that depend on no later frame."""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_cases import SHAPE
from PIL import Image
from tokenizers import Tokenizer

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.media import AudioConfig, VideoConfig
from looptx_core.config.model import ModelConfig
from looptx_core.data.records import media_named, read_records
from looptx_core.errors import DataError, MissingError, UsageError
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.generation.session import Session
from looptx_core.generation.watch import VideoSession
from looptx_core.media.batch import MediaItem, batch_items, lay_out
from looptx_core.media.image.read import read_picture
from looptx_core.media.registry import MEDIA
from looptx_core.media.video.frames import frames_of
from looptx_core.media.video.read import read_pipe, tubelets
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.start import copy_weights

VIDEO = MEDIA["video"]
WATCHING = replace(
    SHAPE, vision_layers=1, vision_width=24, patch_size=4, max_patches=4,
    video=VideoConfig(frames=8, max_patches=4),
)  # fmt: skip
TOKEN = WATCHING.video.token


def clip(shades: list[int], durations: Any = 80, form: str = "WEBP", side: int = 8) -> bytes:
    """Even frames of these shades of grey."""
    frames = [Image.new("RGB", (side, side), (shade,) * 3) for shade in shades]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:], "duration": durations}
    more |= {"lossless": True} if form == "WEBP" else {}
    frames[0].save(file, form, **more)
    return file.getvalue()


def shades(item: MediaItem) -> list[int]:
    """The shade of each frame of an item."""
    steps, rows, columns, _ = item.grid
    frames = item.features.view(steps, rows * columns, 2, -1).mean((1, 3)).flatten()
    return ((frames + 1) * 127.5).round().int().tolist()


def model_of(config: ModelConfig = WATCHING) -> LoopedTransformer:
    torch.manual_seed(0)
    model = LoopedTransformer(config).eval()
    torch.nn.init.normal_(model.encoders()["video"].later.weight, std=0.1)
    return model.double()


def drawn(steps: int, seed: int = 0) -> MediaItem:
    draw = np.random.default_rng(seed)
    return tubelets(draw.integers(0, 256, (2 * steps, 8, 8, 3)), 0.16, WATCHING)


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG"])
def test_frames_are_taken_by_their_time(form: str) -> None:
    """A frame that is shown three times as long counts three times."""
    item = VIDEO.read(clip([0, 80, 240, 160], [80, 240, 80, 80], form), WATCHING)
    assert item.grid == (4, 2, 2, 2)
    assert VIDEO.measure(clip([0, 80, 240, 160], [80, 240, 80, 80], form), WATCHING) == item.grid
    found = shades(item)
    assert all(abs(a - b) <= 2 for a, b in zip(found, [0, 0, 80, 80, 80, 80, 240, 160]))


def test_one_frame_and_a_long_clip() -> None:
    still = VIDEO.read(clip([80]), WATCHING)
    assert still.grid[0] == 1 and len(set(shades(still))) == 1
    long = VIDEO.read(clip([n % 2 * 9 + n // 2 for n in range(400)], 100, "GIF"), WATCHING)
    assert long.grid == (4, 2, 2, 125)
    for made in (clip([80]), clip([0, 90, 180], 30)):
        assert VIDEO.measure(made, WATCHING) == VIDEO.read(made, WATCHING).grid
    assert shades(long) == sorted(shades(long)) and long.features.shape[0] == 16


def test_a_video_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number, pts in enumerate((0, 1, 2, 9)):  # a variable rate: the third lasts longest
            picture = Image.new("RGB", (64, 64), (number * 60,) * 3)
            picture.paste((number * 60 + 30,) * 3, (0, 0, 64, 4))  # above
            frame = av.VideoFrame.from_image(picture)
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    item = VIDEO.read(file, WATCHING)
    found = shades(item)
    assert item.grid[0] == 4 and abs(found[0]) < 12 and abs(found[-1] - 180) < 12
    assert sum(abs(shade - 120) < 12 for shade in found) >= 5
    # A quarter turn, by the matrix of the track's header: what was above is at the right.
    turned = bytearray(file.read_bytes())
    matrix = turned.index(b"tkhd") + 44
    numbers = (0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    turned[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)
    upright = [frame for _, _, frame in frames_of(file.read_bytes(), "a")]
    lying = [frame for _, _, frame in frames_of(bytes(turned), "b")]
    for one, other in zip(upright, lying, strict=True):
        assert other.tobytes() == one.transpose(Image.Transpose.ROTATE_270).tobytes()
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match="damaged"):
        VIDEO.read(damaged, WATCHING)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingError, match=r"pip install 'looptx\[video\]'"):
        VIDEO.read(file, WATCHING)


def test_bad_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = io.BytesIO()
    Image.new("1", (20_000, 4)).save(wide, "PNG")
    assert VIDEO.read(wide.getvalue(), WATCHING).grid[:3] == (1, 1, 4)
    for content, says in (
        (b"nothing", "not a clip"),
        (clip([1, 2])[:60], "damaged clip|not a clip"),
    ):
        with pytest.raises(DataError, match=says):
            VIDEO.read(content, WATCHING)
    with pytest.raises(DataError, match="no such clip"):
        VIDEO.read(tmp_path / "none.webp", WATCHING)
    os.mkfifo(tmp_path / "pipe.webp")
    with pytest.raises(DataError, match="not a regular file"):
        VIDEO.read(tmp_path / "pipe.webp", WATCHING)
    monkeypatch.setattr("looptx_core.media.video.frames.MOST_FRAMES", 2)
    with pytest.raises(DataError, match="over 2 frames"):
        VIDEO.read(clip([1, 60, 120]), WATCHING)
    monkeypatch.undo()
    monkeypatch.setattr("looptx_core.media.video.frames.MOST_PIXELS", 128)
    with pytest.raises(DataError, match="over 128 pixels in all frames"):
        VIDEO.read(clip([1, 60, 120]), WATCHING)
    claims = bytearray(clip([0, 200], form="PNG"))  # 100,000 frames, by its header alone
    at = claims.index(b"acTL")
    claims[at + 4 : at + 8] = (100_000).to_bytes(4, "big")
    claims[at + 12 : at + 16] = zlib.crc32(claims[at : at + 12]).to_bytes(4, "big")
    with pytest.raises(DataError, match="over 20,000 frames"):
        VIDEO.read(bytes(claims), WATCHING)
    with pytest.raises(UsageError, match=r"video\.frames needs the encoder of pictures"):
        replace(SHAPE, video=VideoConfig(frames=8))


def encoded(shade: int, form: str, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade,) * 3).save(file, form)
    return file.getvalue()


class Slow(io.BytesIO):
    """A pipe that gives a few bytes at a time."""

    def read1(self, size: int | None = -1) -> bytes:
        return super().read1(11)


def test_frames_from_a_pipe() -> None:
    """PNG, JPEG and PPM one after another are the clip of these frames."""
    values, forms = [0, 80, 240, 160, 20, 60], ["PNG", "JPEG", "PPM"] * 2
    content = b"".join(encoded(*frame) for frame in zip(values, forms))
    for pipe in (io.BytesIO(content), Slow(content)):
        item = read_pipe(pipe, WATCHING, 12.5)
        whole = VIDEO.read(clip(values), WATCHING)
        assert item.grid == whole.grid
        assert all(abs(a - b) <= 2 for a, b in zip(shades(item), shades(whole), strict=True))
    png, jpeg, ppm = (encoded(80, form) for form in forms[:3])
    for content, says in (
        (png + jpeg[:-9], "frame 2: ends early"),
        (png + b"RIFF", "frame 2: no PNG, JPEG or PPM; write frames as by ffmpeg"),
        (ppm.replace(b"255", b"256", 1), "frame 1: a PPM of 257 values"),
        (b"P6 999999 999999 255\n", "999999x999999 pixels"),
        (b"P6 8 8 255\n", "ends early"),
        (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR", "over 268,435,456 bytes"),
        (b"", "a clip without frames"),
    ):
        with pytest.raises(DataError, match=says):
            read_pipe(io.BytesIO(content), WATCHING, 25)


def test_a_clip_is_changed_as_one_and_never_mirrored() -> None:
    frames = []
    for shade in (40, 200, 120):
        image = Image.new("RGB", (32, 32), (255, 255, 255))
        image.paste((shade, shade, shade), (0, 0, 16, 32))
        frames.append(image)
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=[*frames[1:], frames[0]],
                   duration=80, lossless=True)  # fmt: skip
    plain = VIDEO.read(file.getvalue(), WATCHING)
    for seed in range(20):
        item, again = (
            VIDEO.read(file.getvalue(), WATCHING, augment=np.random.default_rng(seed))
            for _ in range(2)
        )
        assert torch.equal(item.features, again.features) and item.grid == plain.grid
        assert not torch.equal(item.features, plain.features)
        # The first and the last frame are the same picture, and so they stay.
        steps = item.features.view(4, 2, 2, 2, 4, 4, 3)
        assert torch.equal(steps[0, :, :, 0], steps[-1, :, :, 1])
        left, right = steps[0, :, :, 0].mean((0, 2, 3, 4))
        assert left < right


def test_records_in_which_nothing_is_said_and_folders_of_clips(tmp_path: Path) -> None:
    (tmp_path / "moves.webp").write_bytes(clip([0, 200]))
    (tmp_path / "moves.gif").write_bytes(clip([0, 200], form="GIF"))
    (tmp_path / "stays.webp").write_bytes(clip([80]))
    (tmp_path / "stays.gif").write_bytes(clip([80], form="GIF"))
    (tmp_path / "damaged.webp").write_bytes(clip([80])[:20])
    for name in ("moves", "stays", "damaged"):
        (tmp_path / f"{name}.txt").write_text("" if name == "stays" else name)
    records = read_records([tmp_path]).records
    assert {(r.files[0].path.name, r.files[0].medium) for r in records} == {
        ("moves.webp", "video"), ("moves.gif", "video"), ("stays.webp", "image"),
        ("stays.gif", "image"), ("damaged.webp", "image"),
    }  # fmt: skip
    assert media_named([tmp_path]) == {"image", "video"}
    assert [r.turns[0].content[1:] for r in records if "stays" in r.where] == [(("",),)] * 2


def test_a_clip_in_pieces_has_the_states_of_the_whole() -> None:
    """Through the cache, with a text before, between no frames, and after."""
    model, item = model_of(), drawn(5)
    each = item.grid[1] * item.grid[2]
    tokens = torch.tensor([[20, *[TOKEN] * item.length, 21, 22]])
    features = item.features.double()
    whole = model(tokens, 3, media=batch_items([item._replace(features=features)]))
    cache, states, logits = model.new_cache(1, 64, 3), [], []

    def feed(ids: list[int], piece: MediaItem | None = None) -> None:
        media = batch_items([piece]) if piece else None
        found = model(torch.tensor([ids]), 3, cache=cache, media=media)
        states.append(found.state)
        logits.append(found.logits)

    feed([20])
    for first, last in ((0, 1), (1, 3), (3, 5)):
        part = features[first * each : last * each]
        piece = MediaItem("video", part, (last - first, *item.grid[1:]))
        feed([TOKEN] * piece.length, piece)
    feed([21])
    feed([22])
    assert torch.allclose(torch.cat(states, 1), whole.state, atol=1e-9)
    assert torch.allclose(torch.cat(logits, 1), whole.logits, atol=1e-9)


def test_frames_that_come_one_by_one_are_the_clip(tokenizer: Tokenizer) -> None:
    """An answer at any time is that to the clip so far, and leaves no trace."""
    engine = Engine(model_of().float(), tokenizer, kernel="torch")
    frames = np.random.default_rng(3).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
    greedy = {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True}

    def whole(some: Any) -> list[tuple[int, float]]:
        item = tubelets(some, 0.16, WATCHING)
        found = engine.complete([MediaPrompt("a", (item,))], GenerationOptions(**greedy))[0]
        return [(step.id, round(step.logprob, 4)) for step in found.tokens]

    watch = VideoSession(engine)
    with pytest.raises(UsageError, match="no frame came yet"):
        watch.ask()
    for number, frame in enumerate(frames):
        watch.feed(frame, number * 0.08)
        if number in (0, 4, 5, 8):
            # Four steps fit; the fifth makes the older half of those before it be forgotten.
            first = 4 if number == 8 else 0
            for _ in range(2):
                answer = watch.ask("a", **greedy)
                told = [(step.id, round(step.logprob, 4)) for step in answer.tokens]
                assert told == whole(frames[first : number + 1]), number
    small = Session(engine, 4, GenerationOptions(**greedy))
    with pytest.raises(UsageError, match="5 tokens to read, and there is room for 4 more"):
        small.read([5] * 5)
    with pytest.raises(DataError, match="the frame: float64 numbers of shape"):
        watch.feed(np.zeros((8, 8)), 0.7)
    with pytest.raises(UsageError, match="feed them in order"):
        watch.feed(frames[0], 0.1)
    late = VideoSession(engine, 12.5)
    late.feed(frames[0], 0)
    late.feed(frames[1], 3600.0)  # a still hour is no work
    assert engine.counters.prompt < 3000 and late.ask("a", **greedy).tokens


def test_time_is_80_ms_in_sound_and_in_clips() -> None:
    config = replace(WATCHING, audio=AudioConfig(layers=1, width=24))
    sound, steps = config.audio.token, drawn(2)
    tokens = torch.tensor([[9, *[sound] * 4, 8, *[TOKEN] * 8, 8]])
    media = batch_items([MediaItem("audio", torch.zeros(4, 640), (4,)), steps])
    places = lay_out(tokens, media, config).positions[:, 0]
    assert len(places) == 6  # of three axes for clips and two for pictures
    assert (places[:, :7] == torch.tensor([0, 1, 2, 3, 4, 5, 6])).all()
    assert places[0, 6:].tolist() == [6, 6, 6, 6, 8, 8, 8, 8, 10]
    assert places[1, 6:].tolist() == [6, 6, 7, 7, 8, 8, 9, 9, 10]
    assert places[2, 6:].tolist() == [6, 7, 6, 7, 8, 9, 8, 9, 10]
    assert torch.equal(places[3:], places[:3])


def test_a_picture_model_keeps_what_it_knows(cat: Path) -> None:
    """The first loss on pictures is the same, and a still clip is encoded as its picture is."""
    pictures = replace(WATCHING, video=VideoConfig())
    torch.manual_seed(1)
    before = LoopedTransformer(pictures).eval()
    after = LoopedTransformer(WATCHING).eval()
    lacking = after.load_state_dict(before.state_dict(), strict=False)
    assert lacking.missing_keys == ["vision.later.weight"] and not lacking.unexpected_keys
    item = read_picture(cat, pictures)
    tokens = torch.tensor([[0, *[pictures.image_token] * item.length, 20, 21]])
    media = batch_items([item])
    assert torch.equal(before(tokens, 3, media=media).logits, after(tokens, 3, media=media).logits)
    still = MediaItem("video", item.features.repeat(1, 2), (1, *item.grid, 2))
    encoder = after.encoders()["video"]
    torch.nn.init.normal_(encoder.later.weight)
    assert torch.equal(
        encoder(batch_items([item])["image"]), encoder(batch_items([still])["video"])
    )


def test_a_model_of_pictures_can_be_trained_on_to_watch() -> None:
    """It keeps what it sees, and gets what a clip needs besides."""
    source = load_model(bundled_model("picture-model"))
    torch.manual_seed(0)
    model = LoopedTransformer(replace(source.config, video=VideoConfig(frames=8)))
    assert copy_weights(model, source) == ["vision.later.weight"]
    item = MediaItem("video", torch.rand(16, 2 * 3 * 144), (1, 4, 4, 2))
    picture = MediaItem("image", item.features[:, : 3 * 144], (4, 4))
    seen = model.encoders()["video"](batch_items([item])["video"])
    before = source.model.encoders()["image"](batch_items([picture])["image"])
    assert torch.allclose(seen, before, atol=1e-5)


def test_commands(
    tmp_path: Path, colour_shards: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run on clips with texts is trained, asked and looked into."""
    for number in range(6):
        (tmp_path / f"{number}.webp").write_bytes(clip([40 * number, 200, 100]))
    lines = [{"video": f"{n}.webp", "text": f"clip {n % 3}"} for n in range(6)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings: dict[str, Any] = {
        "seq_len": 40, "batch_size": 4, "val_batches": 1, "mix": "0:1",
        "model": {"d_model": 48, "head_dim": 12, "d_ff": 64, "core_layers": 1, "coda_layers": 0,
                  "max_loops": 2, "vision_layers": 1, "vision_width": 24, "patch_size": 4,
                  "video": {"frames": 6, "max_patches": 4}},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    run = ["--out", str(tmp_path / "run"), "--steps", "2", "--quiet"]
    data = ["--data", str(colour_shards), "--data", str(tmp_path / "all.jsonl")]
    assert main(["train", "--config", str(tmp_path / "c.yaml"), *data, *run]) == 0
    assert "Texts beside clips" in capsys.readouterr().out
    shared = ["--video", str(tmp_path / "1.webp"), "--model", str(tmp_path / "run"), "--quiet"]
    more = ["--init", str(tmp_path / "run"), "--set", "model.video.frames=8", "--seq-len", "48"]
    more += ["--steps", "1", "--val-batches", "1", "--mix", "0:1", "--out", str(tmp_path / "more")]
    assert main(["train", *data, *more]) == 0
    assert "weights: those of run" in capsys.readouterr().err
    kept = json.loads((tmp_path / "more" / "final" / "config.json").read_text())
    assert (kept["d_model"], kept["video"]["frames"]) == (48, 8)
    assert main(["train", *data, *more, "--overwrite", "--set", "model.d_model=24"]) == 2
    assert "leave out the keys of model that change its shape" in capsys.readouterr().err
    frames = b"".join(encoded(shade, "PNG") for shade in (40, 200, 100, 90))
    piped = ["generate", "--model", str(tmp_path / "run"), "--quiet", "--video", "-"]
    for code, flags, says in (
        (0, ["--fps", "12.5", "--every", "0.16"], r"\[0:00.0 - 0:00.2\] .*\n\[0:00.2 - 0:00.3\]"),
        (0, [], "."),
        (2, ["--fps", "0"], "--fps 0: above 0"),
        (2, ["--chat"], "give the message as an argument"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(frames)))
        assert main([*piped, *flags, "--max-new-tokens", "2"]) == code
        assert re.search(says, "".join(capsys.readouterr()))
    assert main(["generate", *shared, "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1 + 3 * 4
    report = ["--decode-tokens", "0", "--val-batches", "2", "--seq-len", "32"]
    report += ["--out", str(tmp_path / "r")]
    assert main(["inspect-loops", *shared, *report]) == 0
    assert "how far a loop moves each step of time" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "r" / "report.json").read_text())["clips"]
    assert torch.tensor(found["change_by_loop"]).shape == (1, 3, 2, 2)
    assert (tmp_path / "r" / "steps-1.png").exists()
