"""Pictures as data: read, paired with texts, mixed, and refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import CONFIG, IMG, png
from PIL import Image

from looptx_core.config.run import TrainConfig
from looptx_core.data.examples import PackedExamples
from looptx_core.data.mixture import MixedData, Mixture, record_examples
from looptx_core.data.records import media_named, read_records
from looptx_core.data.shards import open_shards
from looptx_core.errors import DataError, UsageError
from looptx_core.media.image.read import grid_of, measure, read_picture

# Reading pictures


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (20, 30), (1000, 10), (10, 1000), (37, 41), (480, 640)]
)
@pytest.mark.parametrize("most", [1, 7, 36, 64])
def test_grids_keep_proportions_within_the_limit(height: int, width: int, most: int) -> None:
    rows, columns = grid_of(height, width, 8, most)
    assert 1 <= rows * columns <= most
    if most == 64 and 1 / 4 <= height / width <= 4:
        assert rows / columns == pytest.approx(height / width, rel=0.25)
        assert rows * columns > 0.7 * most


def test_patches_are_the_picture() -> None:
    """Red at the left, blue at the right, row by row."""
    image = Image.new("RGB", (16, 8), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 16, 8))
    out = io.BytesIO()
    image.save(out, "PNG")
    config = replace(CONFIG, patch_size=4, max_patches=8)
    found = read_picture(out.getvalue(), config)
    assert found.grid == (2, 4)
    # Corners, away from the edge that the resampling may blur.
    assert found.features[0].view(4, 4, 3)[0, 0].tolist() == [1, -1, -1]
    assert found.features[7].view(4, 4, 3)[3, 3].tolist() == [-1, -1, 1]


def test_orientation_alpha_and_palette() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    out = io.BytesIO()
    Image.new("RGB", (40, 20)).save(out, "JPEG", exif=exif)
    turned = read_picture(out.getvalue(), CONFIG)
    assert turned.grid[0] > turned.grid[1]
    assert measure(out.getvalue(), CONFIG) == turned.grid
    clear = read_picture(png((16, 16), "RGBA", color=(0, 0, 0, 0)), CONFIG)
    assert clear.features.min() == 1  # transparent is white, not what lies under it
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    out = io.BytesIO()
    palette.save(out, "PNG")
    green = read_picture(out.getvalue(), CONFIG).features.view(-1, 3)
    assert torch.equal(green, torch.tensor([-1.0, 1.0, -1.0]).expand_as(green))


def test_augmentation_is_a_function_of_its_generator(cat: Path) -> None:
    def reconstruct(seed: int) -> torch.Tensor:
        return read_picture(cat, CONFIG, augment=np.random.default_rng(seed)).features

    assert torch.equal(reconstruct(1), reconstruct(1))
    assert not torch.equal(reconstruct(1), reconstruct(2))


def _grey(kind: str) -> Image.Image:
    """A ramp from black to white, in 8 bits or in more."""
    ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    match kind:
        case "8":
            return Image.fromarray((ramp * 255).round().astype(np.uint8))
        case "16":
            return Image.fromarray((ramp * 65535).round().astype(np.uint16))
        case "32":
            return Image.fromarray((ramp * 65535).round().astype(np.int32))
        case _:
            return Image.fromarray(ramp.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "form"),
    [("16", "PNG"), ("16", "TIFF"), ("32", "TIFF"), ("float", "TIFF"), ("8", "TIFF")],
)
@pytest.mark.parametrize("augment", [False, True])
def test_deeper_greys_are_the_same_picture(kind: str, form: str, augment: bool) -> None:
    found = []
    for image, how in ((_grey("8"), "PNG"), (_grey(kind), form)):
        out = io.BytesIO()
        image.save(out, how)
        reconstruct = np.random.default_rng(0) if augment else None
        found.append(read_picture(out.getvalue(), CONFIG, augment=reconstruct).features)
    assert (found[0] - found[1]).abs().max() < 0.02


@pytest.mark.parametrize("values", [(0, 70_000), (-5, 100), (0, 200), (0, 2**31 - 1)])
def test_greys_of_no_known_scale_are_refused(values: tuple[int, int]) -> None:
    out = io.BytesIO()
    Image.fromarray(np.array([values] * 8, np.int32).repeat(4, 1)).save(out, "TIFF")
    with pytest.raises(DataError, match="whose scale is not known"):
        read_picture(out.getvalue(), CONFIG)
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(out, "TIFF")
    with pytest.raises(DataError, match="whose scale is not known"):
        read_picture(out.getvalue(), CONFIG)


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO", "PPM", "PDF", "SGI", "IM", "DDS"])
def test_only_the_promised_formats_are_opened(form: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "cat.png", form)
    for source in (tmp_path / "cat.png", (tmp_path / "cat.png").read_bytes()):
        with pytest.raises(DataError, match="not a picture that can be read; give PNG"):
            read_picture(source, CONFIG)


@pytest.mark.parametrize("kind", [b"zTXt", b"tEXt", b"iTXt"])
def test_texts_in_a_picture_are_not_unpacked(kind: bytes) -> None:
    import struct
    import zlib

    packed = zlib.compress(b"0" * (80 << 20))
    body = {
        b"zTXt": b"a\0\0" + packed, b"tEXt": b"a\0" + b"0" * (2 << 20),
        b"iTXt": b"a\0\1\0\0\0" + packed,
    }[kind]  # fmt: skip
    chunk = struct.pack(">I", len(body)) + kind + body
    chunk += struct.pack(">I", zlib.crc32(kind + body))
    plain = png((16, 16), color=(10, 200, 30))
    found = read_picture(plain[:33] + 5 * chunk + plain[33:], CONFIG)
    assert torch.equal(found.features, read_picture(plain, CONFIG).features)


def test_a_large_picture_takes_little_memory(tmp_path: Path) -> None:
    Image.new("L", (8000, 7900), 255).save(tmp_path / "large.png")
    code = (
        "import resource, sys; from picture_cases import CONFIG\n"
        "from looptx_core.media.image.read import read_picture\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "features = read_picture(sys.argv[1], CONFIG).features\n"
        "assert features.min() == 1, features.min()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.png")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 400 << 10, "KiB beyond what the imports took"


def _bomb() -> bytes:
    """A small file that claims 20,000 x 20,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no picture", "not a picture"),
        (b"", "not a picture"),
        (png((64, 64), color=(9, 3, 5), compress_level=0)[:4000], "damaged"),
        (png((1, 1)), "1x1 pixels"),
        (_bomb(), "pixels; the limit is 64 million"),
    ],
)
def test_bad_pictures(data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_picture(data, CONFIG)


# Pairs


def test_a_folder_and_json_lines_are_the_same_pairs(colours: Path) -> None:
    listed = read_records([colours / "pairs.jsonl"])
    held = read_records([colours / "pairs"])
    one, other = (
        [
            ([file.path.resolve() for file in record.files], record.turns[0].content[-1])
            for record in read.records
        ]
        for read in (listed, held)
    )
    assert one == other
    assert len(listed.records) == 12
    assert media_named([colours / "pairs.jsonl"]) == media_named([colours / "pairs"]) == {"image"}


def test_texts_are_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    assert not media_named([tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl", "absent"])


def test_several_pictures_and_interleaved_parts(colours: Path, colour_shards: Path) -> None:
    one, two = "pairs/00.png", "pairs/01.png"
    records = [
        {"image": [one, two], "text": "red green"},
        {"parts": [{"text": "red"}, {"image": one}, {"text": "blue"}, {"image": two}]},
    ]
    (colours / "more.jsonl").write_text("\n".join(map(json.dumps, records)))
    pairs = read_records([colours / "more.jsonl"])
    found = record_examples(pairs, open_shards(colour_shards).tokenizer, CONFIG, 80)
    examples = [example.ways[0] for example in found]
    for example in examples:
        sizes = [measure(file.path, CONFIG) for file in example.files]
        patches = example.ids == IMG
        assert patches.sum() == sum(r * c for r, c in sizes)
        assert not example.counted[patches].any()
        assert example.counted[~patches].sum() == (~patches).sum() - 1  # all but the first end
    assert examples[1].counted[1]


def test_one_of_several_texts_is_drawn_in_each_epoch(colours: Path, colour_shards: Path) -> None:
    image = "pairs/00.png"
    records = [
        {"image": image, "text": ["red", "colour: red"]},
        {"parts": [{"text": ["red", "green", "blue"]}, {"image": image}, {"text": "white"}]},
    ]
    (colours / "more.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokenizer = open_shards(colour_shards).tokenizer
    examples = record_examples(read_records([colours / "more.jsonl"]), tokenizer, CONFIG, 80)
    said = [{tokenizer.decode(way.ids[way.counted].tolist()) for way in e.ways} for e in examples]
    assert said == [{"red", "colour: red"}, {"redwhite", "greenwhite", "bluewhite"}]
    longest = max(len(way.ids) for way in examples[0].ways)
    drawn = PackedExamples(examples[:1], longest - 1, 0, CONFIG, seed=3)
    seen = [drawn[epoch]["tokens"].tolist() for epoch in range(12)]
    assert len({tuple(tokens) for tokens in seen}) == 2
    assert seen[5] == drawn[5]["tokens"].tolist()
    plain = PackedExamples(examples[:1], longest - 1, 0, CONFIG)
    for epoch in (0, 1):
        assert plain[epoch]["tokens"].tolist() == examples[0].ways[0].ids.tolist()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"image": "absent.png", "text": "a"}', "line 2: no picture absent.png"),
        ('{"image": "pairs/00.png"}', "line 2: needs a picture and a text"),
        ('{"image": "pairs/00.png", "text": " "}', "line 2: needs a picture and a text"),
        ('{"image": "pairs/00.png", "text": ["a", 1]}', "line 2: needs a picture and a text"),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_bad_records_name_their_line(colours: Path, line: str, says: str) -> None:
    good = '{"image": "pairs/00.png", "text": "red"}'
    (colours / "bad.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError, match=says):
        read_records([colours / "bad.jsonl"])
    if line != "{":
        left = read_records([colours / "bad.jsonl"], skip_bad=True)
        assert (len(left.records), left.skipped) == (2, 1)


def test_a_bad_picture_is_named_or_skipped(colours: Path, colour_shards: Path) -> None:
    (colours / "pairs" / "03.png").write_bytes(b"not a picture")
    tokenizer = open_shards(colour_shards).tokenizer
    with pytest.raises(DataError, match=r"03\.png: not a picture"):
        record_examples(read_records([colours / "pairs"]), tokenizer, CONFIG, 80)
    pairs = read_records([colours / "pairs"])
    examples = record_examples(pairs, tokenizer, CONFIG, 80, skip_bad=True)
    assert (len(examples), pairs.skipped) == (11, 1)


@pytest.mark.parametrize("text", ["1", "1:0", "-1:1", "a:b", "1:1:1"])
def test_a_bad_mix(text: str) -> None:
    with pytest.raises(UsageError, match="`mix`"):
        TrainConfig(mix=text).weights  # noqa: B018


def test_a_mixture_follows_its_weights_and_leaves_nothing_out() -> None:
    class Numbers:
        def __init__(self, count: int) -> None:
            self.count, self.seen = count, []

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            self.seen.append(index % self.count)
            return {"ids": torch.tensor(index % self.count)}

    many, few = Numbers(30), Numbers(10)
    mixture = Mixture([many, few], [1, 2], seed=0)
    assert len(mixture) == 15
    for index in range(6 * len(mixture)):
        mixture[index]
    assert sorted(many.seen) == list(range(30))
    assert sorted(few.seen) == sorted(list(range(10)) * 6)


def test_batches_mix_text_and_pictures(colours: Path, colour_shards: Path) -> None:
    data = MixedData(
        colour_shards, read_records([colours / "pairs"]), CONFIG, seq_len=64, mix=(1, 1),
        micro_batch=8, batches=3, seed=0,
    )  # fmt: skip
    for batch in data.train_dataloader():
        assert batch["tokens"].shape == (8, 65)
        patches = (batch["tokens"] == IMG).sum()
        assert patches == len(batch["media.image.features"])
        assert patches == batch["media.image.grids"].prod(1).sum()
    texts, captions = (list(data.held_out(part)) for part in data.val_parts.values())
    assert all("media.image.grids" not in batch for batch in texts)
    assert all("media.image.grids" in batch for batch in captions)


def test_held_out_texts_are_not_trained_on(colours: Path, colour_shards: Path) -> None:
    for file in (colours / "pairs").glob("*.txt"):
        file.write_text(file.read_text().split()[0])  # two pictures of each colour
    data = MixedData(
        colour_shards, read_records([colours / "pairs"]), CONFIG, seq_len=64, mix=(0, 1),
        micro_batch=2, batches=1, seed=0,
    )  # fmt: skip
    train = data.train.parts[0].examples
    held = data.val_parts["records"].examples
    texts = [{e.ids[e.counted].tobytes() for e in part} for part in (train, held)]
    assert texts[0] and texts[1] and not texts[0] & texts[1]
    assert len(train) + len(held) == 12


def test_texts_that_belong_to_no_image_are_not_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("black")
    assert len(read_records([tmp_path]).records) == 1
    (tmp_path / "essay.txt").write_text("a text of its own")
    with pytest.raises(DataError, match=r"essay\.txt"):
        read_records([tmp_path], skip_bad=True)
