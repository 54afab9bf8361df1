"""Pictures: read, laid out, seen by the model, learned from, and refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.checkpoint.registry import abilities
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.corpus import bundled_text
from looptx_core.data.pairs import (
    MixedData,
    Mixture,
    PicturePacked,
    is_pairs,
    mix_of,
    pair_examples,
    read_pairs,
)
from looptx_core.data.pictures import grid_of, measure, read_picture
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.data.shards import open_shards
from looptx_core.errors import DataError, UsageError
from looptx_core.generation.engine import Engine, PicturePrompt
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rope import rotary_tables
from looptx_core.model.vision import Pictures, lay_out, together
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.reconstruction import draw, hide, places_of

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=96,
    vision_layers=2, vision_width=32, patch_size=4, max_patches=12,
)  # fmt: skip
IMG = CONFIG.image_token


def build(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> LoopedTransformer:
    torch.manual_seed(1)
    model = LoopedTransformer(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def pictures(*grids: tuple[int, int]) -> Pictures:
    count = sum(r * c for r, c in grids)
    draw = torch.Generator().manual_seed(5)
    patches = torch.rand(count, 3 * CONFIG.patch_size**2, generator=draw, dtype=torch.float64)
    return Pictures(patches * 2 - 1, torch.tensor(grids))


def row(*parts: int | tuple[int, int]) -> list[int]:
    """Tokens; a pair is a picture of so many rows and columns."""
    out: list[int] = []
    for part in parts:
        out += [part] if isinstance(part, int) else [IMG] * (part[0] * part[1])
    return out


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    """A picture of 30 x 20 pixels with some structure."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


# Positions


def test_text_is_one_dimensional_rope_on_any_number_of_axes() -> None:
    places = torch.arange(9)[None, None]
    once = rotary_tables(places, 8, 1e4, torch.float64)
    for axes in (2, 3):
        several = rotary_tables(places.expand(axes, -1, -1), 8, 1e4, torch.float64)
        assert all(torch.equal(a, b) for a, b in zip(once, several))


def test_each_axis_turns_frequencies_of_its_own() -> None:
    places = torch.zeros(2, 1, 1)
    places[0] = 3  # the row alone
    cos, _ = rotary_tables(places, 8, 1e4, torch.float64)
    turned = cos[0, 0, 0, :4] != 1
    assert turned.tolist() == [True, False, True, False]


def test_layout_by_hand() -> None:
    tokens = torch.tensor([row(9, (2, 3), 8, 7)])
    found = lay_out(tokens, torch.tensor([[2, 3]]), IMG)
    assert found.positions[0, 0].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 5]
    assert found.positions[1, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5]
    assert found.picture[0].tolist() == [-1, 0, 0, 0, 0, 0, 0, -1, -1]
    assert found.ends.tolist() == [6]


def test_layout_of_two_pictures_side_by_side_and_padding() -> None:
    tokens = torch.tensor([row(0, 0, (1, 2), (2, 1), 7)])
    found = lay_out(tokens, torch.tensor([[1, 2], [2, 1]]), IMG, torch.tensor([2]))
    assert found.positions[0, 0].tolist() == [0, 0, 0, 0, 2, 3, 4]
    assert found.positions[1, 0].tolist() == [0, 0, 0, 1, 2, 2, 4]
    assert found.picture[0].tolist() == [-1, -1, 0, 0, 1, 1, -1]


@pytest.mark.parametrize("ids", [row(9, (2, 2), 8), row(9, 2, 8, 2, 2, 2, 2, 2)])
def test_image_tokens_that_do_not_match(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="image tokens"):
        lay_out(torch.tensor([ids]), torch.tensor([[2, 3]]), IMG)


# The model


def test_patches_are_told_apart_by_their_places_alone() -> None:
    """Permuted patches change the result; permuted together with their places they do not."""
    model = build(replace(CONFIG, prelude_layers=1))
    seen = pictures((3, 4))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([row(9, (3, 4), 8)])
    shuffled = Pictures(seen.patches[order], seen.grids)
    plain = model(tokens, 3, pictures=seen).logits[0, -1]
    assert (model(tokens, 3, pictures=shuffled).logits[0, -1] - plain).abs().max() > 1e-3

    def moved(patches: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        layout = model.layout(tokens, seen)
        assert layout is not None
        layout.positions[:, :, 1:13] = layout.positions[:, :, 1:13][:, :, places]
        around = model.surroundings(14, layout=layout)
        x = model.embedding(tokens)
        x[0, 1:13] = patches
        for block in model.prelude:
            x = block(x, around)
        state = model.step(x, x, 1, around)
        return model.decode(state, around)[0, -1]

    encoded = model.vision(seen)
    together_ = moved(encoded[order], order)
    torch.testing.assert_close(together_, moved(encoded, torch.arange(12)), rtol=0, atol=1e-9)
    assert (moved(encoded[order], torch.arange(12)) - together_).abs().max() > 1e-3


def test_the_encoder_knows_rows_from_columns() -> None:
    encoder = build().vision
    assert encoder is not None
    seen = pictures((2, 3))
    turned = Pictures(seen.patches, torch.tensor([[3, 2]]))
    assert (encoder(seen) - encoder(turned)).abs().max() > 1e-3


def test_the_encoder_keeps_pictures_apart() -> None:
    encoder = build().vision
    assert encoder is not None
    both = pictures((2, 3), (1, 4))
    each = [
        encoder(Pictures(both.patches[:6], both.grids[:1])),
        encoder(Pictures(both.patches[6:], both.grids[1:])),
    ]
    torch.testing.assert_close(encoder(both), torch.cat(each), rtol=0, atol=1e-9)


def test_text_alone_is_the_text_model() -> None:
    model = build()
    text = LoopedTransformer(replace(CONFIG, vision_layers=0)).double().eval()
    text.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("vision.")}
    )
    tokens = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens, 4).logits, text(tokens, 4).logits)


@pytest.mark.parametrize("attention", ["both", "causal"])
@pytest.mark.parametrize("loops", range(1, 11))
def test_cached_equals_uncached(loops: int, attention: str) -> None:
    """The pictures in one piece, the text after them one by one."""
    model = build(replace(CONFIG, image_attention=attention))
    seen = pictures((2, 3), (3, 2))
    tokens = torch.tensor([row(9, (2, 3), 8, (3, 2), 7, 5, 6, 4)])
    whole = model(tokens, loops, pictures=seen).logits
    cache = LoopCache(model.config, 1, tokens.shape[1], loops, dtype=torch.float64)
    parts = [model(tokens[:, :15], loops, cache, pictures=seen).logits]
    parts += [model(tokens[:, i : i + 1], loops, cache).logits for i in range(15, 18)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


def test_patches_see_later_ones_of_their_own_picture_only() -> None:
    """Two patches of a later row change what an earlier patch becomes; a later text does not."""
    model, seen = build(), pictures((2, 2), (2, 2))
    tokens = torch.tensor([row(9, (2, 2), 8, (2, 2), 7)])

    def first(images: Pictures, ids: torch.Tensor = tokens) -> torch.Tensor:
        layout = model.layout(ids, images)
        around = model.surroundings(ids.shape[1], layout=layout)
        x = model.embedding(ids)
        x[0, 1:5], x[0, 6:10] = images.patches[:4, :32], images.patches[4:, :32]
        return model.step(x, x, 1, around)[0, 1]

    before = first(seen)
    for patch, changes in ((3, True), (7, False)):
        other = seen.patches.clone()
        other[patch] += 1
        changed = (first(Pictures(other, seen.grids)) - before).abs().max() > 1e-9
        assert changed == changes


def test_a_batch_of_pictures_and_text_equals_single_runs(cat: Path) -> None:
    model = build()
    tokenizer = _tokenizer()
    engine = Engine(model, tokenizer, ExitSettings(confidence=0.5))
    picture = read_picture(cat, CONFIG)
    small = read_picture(_png((40, 8)), CONFIG)
    prompts = [
        PicturePrompt("", (picture,)),
        "abc",
        PicturePrompt("ab<|image|>c<|image|>d", (picture, small)),
    ]
    options = GenerationOptions(max_new_tokens=6, temperature=0, ignore_eos=True)
    for loops in ("auto", 3):
        asked = replace(options, loops=loops)
        batch = engine.complete(prompts, asked)
        single = [engine.complete([prompt], asked)[0] for prompt in prompts]
        for one, other in zip(batch, single):
            assert [(s.id, s.loops) for s in one.tokens] == [(s.id, s.loops) for s in other.tokens]


def _tokenizer():
    from looptx_core.data.tokenizer import train_tokenizer

    return train_tokenizer(["abcd efgh " * 50, "aab bbc ccd dda ab cd ef gh " * 50], 280)


# Hidden patches


def test_a_hidden_patch_is_not_seen_and_the_others_are() -> None:
    encoder = build(replace(CONFIG, reconstruct=True)).vision
    assert encoder is not None
    seen, hidden = pictures((2, 3), (1, 2)), torch.zeros(8, dtype=torch.bool)
    hidden[4] = hidden[7] = True
    before = encoder(replace(seen, hidden=hidden))
    for patch in range(8):
        other = seen.patches.clone()
        other[patch] += 1
        moved = (encoder(Pictures(other, seen.grids, hidden)) - before).abs().amax(1)
        own = slice(0, 6) if patch < 6 else slice(6, 8)
        assert (moved[own].max() < 1e-12) == bool(hidden[patch])
        assert (encoder(Pictures(other, seen.grids)) - encoder(seen)).abs().max() > 1e-3


def test_hidden_patches_are_learned_to_be_drawn_from_the_others() -> None:
    """Pictures of one patch again and again; a confidence that tells these from noise."""
    config = replace(CONFIG, reconstruct=True, max_loops=2)
    torch.manual_seed(0)
    model = LoopedTransformer(config)
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=2), 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    grid, tokens = torch.tensor([[2, 3]] * 8), torch.tensor([row(9, (2, 3), 8, 7)] * 8)
    errors = []
    for step in range(200):
        base = torch.rand(8, 1, 3).mul(2).sub(1)
        stripes = torch.where(torch.arange(16)[:, None] % 4 < 2, base, -base)
        even = stripes.reshape(8, 1, 48).expand(8, 6, 48)
        noise = torch.rand(8, 6, 48) * 2 - 1
        noisy = torch.arange(8)[:, None, None] % 2 == 1
        drawn = hide(Pictures(torch.where(noisy, noise, even).reshape(48, 48), grid), 0.4)
        found = loop_loss(model, tokens, schedule, step, torch.arange(8), pictures=drawn)
        optimizer.zero_grad()
        (found.loss + found.confidence_loss).backward()
        optimizer.step()
        errors.append(float(found.restored))
    assert errors[0] > 0.9
    places = places_of(tokens, IMG, drawn.hidden)
    result = draw(model, model.norm(model(tokens, 2, pictures=drawn).state), places, drawn)
    of_noise = (places >= 0).nonzero()[:, 0] % 2 == 1
    assert result.error[~of_noise].mean() < 0.6 < 0.9 < result.error[of_noise].mean()
    assert result.logit[~of_noise].mean() > result.logit[of_noise].mean() + 1


def test_beside_other_ranks_pictures_text_has_the_same_gradients() -> None:
    """Of zero, for the encoder: ranks sum up what has a gradient, and must agree on it."""
    torch.manual_seed(0)
    model = LoopedTransformer(replace(CONFIG, reconstruct=True))
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=2), CONFIG.max_loops)
    tokens = torch.randint(5, 20, (2, 9))

    def of_pictures() -> list[torch.Tensor | None]:
        model.zero_grad()
        loop_loss(model, tokens, schedule, 0, torch.arange(2)).loss.backward()
        return [p.grad for part in (model.vision, model.patch_head) for p in part.parameters()]

    assert all(grad is None for grad in of_pictures())
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = of_pictures()
    finally:
        torch.distributed.destroy_process_group()
    assert found and all(grad is not None and not grad.any() for grad in found)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_inspecting_a_picture_maps_its_patches(
    cat: Path, tmp_path: Path, run, reconstruct: bool
) -> None:
    model = build(replace(CONFIG, reconstruct=reconstruct), torch.float32)
    save_model(tmp_path / "m", model, _tokenizer(), exit_settings=ExitSettings(), facts={})
    (tmp_path / "t.txt").write_text("abcd efgh " * 900)
    code, out, err = run(
        "inspect-loops", "--image", cat, "--model", tmp_path / "m", "--data", tmp_path / "t.txt",
        "--out", tmp_path / "r", "--seq-len", 32, "--val-batches", 1, "--decode-tokens", 0,
        "--batch-size", 4,
    )  # fmt: skip
    assert code == 0, err
    assert "how far a loop moves each patch" in out
    assert "cat.png, 2 x 3 patches" in out
    (found,) = json.loads((tmp_path / "r" / "report.json").read_text())["pictures"]
    assert np.shape(found["change_by_loop"]) == (9, 2, 3)
    assert np.shape(found["shown"]) == (8, 12, 3)
    assert (tmp_path / "r" / "patches-1.png").is_file()
    assert (tmp_path / "r" / "hidden-1.png").is_file() == reconstruct
    if reconstruct:
        assert np.shape(found["confidence_by_loop"]) == (10, 2, 3)
        assert np.min(found["confidence_by_loop"]) > 0 and np.min(found["error_by_loop"]) > 0
    # The map of the second loop, again by hand.
    picture = read_picture(cat, CONFIG)
    tokens, seen = torch.tensor([row(0, (2, 3))]), together([picture])
    around = model.surroundings(7, layout=model.layout(tokens, seen))
    first, second = model.states(tokens, 2, around=around, pictures=seen)
    moved = ((second - first).norm(dim=-1) / second.norm(dim=-1))[0, 1:].view(2, 3)
    np.testing.assert_allclose(found["change_by_loop"][0], moved.detach(), atol=1e-4)


# Reading pictures


def _png(size: tuple[int, int], mode: str = "RGB", **how: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, how.pop("color", 0)).save(out, "PNG", **how)  # type: ignore[arg-type]
    return out.getvalue()


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
    assert (found.rows, found.columns) == (2, 4)
    # Corners, away from the edge that the resampling may blur.
    assert found.patches[0].view(4, 4, 3)[0, 0].tolist() == [1, -1, -1]
    assert found.patches[7].view(4, 4, 3)[3, 3].tolist() == [-1, -1, 1]


def test_orientation_alpha_and_palette() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    out = io.BytesIO()
    Image.new("RGB", (40, 20)).save(out, "JPEG", exif=exif)
    turned = read_picture(out.getvalue(), CONFIG)
    assert turned.rows > turned.columns
    assert measure(out.getvalue(), CONFIG) == (turned.rows, turned.columns)
    clear = read_picture(_png((16, 16), "RGBA", color=(0, 0, 0, 0)), CONFIG)
    assert clear.patches.min() == 1  # transparent is white, not what lies under it
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    out = io.BytesIO()
    palette.save(out, "PNG")
    green = read_picture(out.getvalue(), CONFIG).patches.view(-1, 3)
    assert torch.equal(green, torch.tensor([-1.0, 1.0, -1.0]).expand_as(green))


def test_augmentation_is_a_function_of_its_generator(cat: Path) -> None:
    def draw(seed: int) -> torch.Tensor:
        return read_picture(cat, CONFIG, augment=np.random.default_rng(seed)).patches

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


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
        (_png((64, 64), color=(9, 3, 5), compress_level=0)[:4000], "damaged"),
        (_png((1, 1)), "1x1 pixels"),
        (_bomb(), "pixels; the limit is 64 million"),
    ],
)
def test_bad_pictures(data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_picture(data, CONFIG)


# Pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in one colour each, with its name, as a folder and as JSON lines."""
    colours = ("red", "green", "blue", "white", "black", "orange")
    lines = []
    (tmp_path / "pairs").mkdir()
    for number in range(12):
        name = colours[number % 6]
        file = tmp_path / "pairs" / f"{number:02}.png"
        Image.new("RGB", (16, 16 + number), name).save(file)
        file.with_suffix(".txt").write_text(f"{name} {number}\n")
        lines.append(json.dumps({"image": f"pairs/{number:02}.png", "text": f"{name} {number}"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shards"
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(bundled_text().read_text("utf-8")[:60_000] + " red green blue white black" * 9)
    tokenize_corpus([text], out, 300)
    return out


def test_a_folder_and_json_lines_are_the_same_pairs(folder: Path) -> None:
    listed = read_pairs([folder / "pairs.jsonl"])
    held = read_pairs([folder / "pairs"])
    assert [[p.resolve() if isinstance(p, Path) else p for p in r] for _, r in listed.records] == [
        [p.resolve() if isinstance(p, Path) else p for p in r] for _, r in held.records
    ]
    assert len(listed.records) == 12
    assert is_pairs(folder / "pairs.jsonl") and is_pairs(folder / "pairs")


def test_texts_are_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    assert not any(map(is_pairs, (tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl", "absent")))


def test_several_pictures_and_interleaved_parts(folder: Path, shards: Path) -> None:
    one, two = "pairs/00.png", "pairs/01.png"
    records = [
        {"image": [one, two], "text": "red green"},
        {"parts": [{"text": "red"}, {"image": one}, {"text": "blue"}, {"image": two}]},
    ]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, records)))
    pairs = read_pairs([folder / "more.jsonl"])
    found = pair_examples(pairs, open_shards(shards).tokenizer, CONFIG, 80)
    examples = [example.ways[0] for example in found]
    for example, pictures_ in zip(examples, [example.pictures for example in found]):
        sizes = [measure(file, CONFIG) for file in pictures_]
        patches = example.ids == IMG
        assert patches.sum() == sum(r * c for r, c in sizes)
        assert not example.counted[patches].any()
        assert example.counted[~patches].sum() == (~patches).sum() - 1  # all but the first end
    assert examples[1].counted[1]


def test_one_of_several_texts_is_drawn_in_each_epoch(folder: Path, shards: Path) -> None:
    image = "pairs/00.png"
    records = [
        {"image": image, "text": ["red", "colour: red"]},
        {"parts": [{"text": ["red", "green", "blue"]}, {"image": image}, {"text": "white"}]},
    ]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokenizer = open_shards(shards).tokenizer
    examples = pair_examples(read_pairs([folder / "more.jsonl"]), tokenizer, CONFIG, 80)
    said = [{tokenizer.decode(way.ids[way.counted].tolist()) for way in e.ways} for e in examples]
    assert said == [{"red", "colour: red"}, {"redwhite", "greenwhite", "bluewhite"}]
    longest = max(len(way.ids) for way in examples[0].ways)
    drawn = PicturePacked(examples[:1], longest - 1, 0, CONFIG, draw=3)
    seen = [drawn[epoch]["tokens"].tolist() for epoch in range(12)]
    assert len({tuple(tokens) for tokens in seen}) == 2
    assert seen[5] == drawn[5]["tokens"].tolist()
    plain = PicturePacked(examples[:1], longest - 1, 0, CONFIG)
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
def test_bad_records_name_their_line(folder: Path, line: str, says: str) -> None:
    good = '{"image": "pairs/00.png", "text": "red"}'
    (folder / "bad.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError, match=says):
        read_pairs([folder / "bad.jsonl"])
    if line != "{":
        left = read_pairs([folder / "bad.jsonl"], skip_bad=True)
        assert (len(left.records), left.skipped) == (2, 1)


def test_a_bad_picture_is_named_or_skipped(folder: Path, shards: Path) -> None:
    (folder / "pairs" / "03.png").write_bytes(b"not a picture")
    tokenizer = open_shards(shards).tokenizer
    with pytest.raises(DataError, match=r"03\.png: not a picture"):
        pair_examples(read_pairs([folder / "pairs"]), tokenizer, CONFIG, 80)
    pairs = read_pairs([folder / "pairs"])
    examples = pair_examples(pairs, tokenizer, CONFIG, 80, skip_bad=True)
    assert (len(examples), pairs.skipped) == (11, 1)


@pytest.mark.parametrize("text", ["1", "1:0", "-1:1", "a:b", "1:1:1"])
def test_a_bad_mix(text: str) -> None:
    with pytest.raises(UsageError, match="--mix"):
        mix_of(text)


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


def test_batches_mix_text_and_pictures(folder: Path, shards: Path) -> None:
    data = MixedData(
        shards, read_pairs([folder / "pairs"]), CONFIG, seq_len=64, mix=(1, 1), micro_batch=8,
        batches=3, seed=0,
    )  # fmt: skip
    for batch in data.train_dataloader():
        assert batch["tokens"].shape == (8, 65)
        patches = (batch["tokens"] == IMG).sum()
        assert patches == len(batch["patches"]) == batch["grids"].prod(1).sum()
    texts, captions = (list(data.held_out(part)) for part in data.val_parts.values())
    assert all("patches" not in batch for batch in texts)
    assert all("patches" in batch for batch in captions)


def test_held_out_texts_are_not_trained_on(folder: Path, shards: Path) -> None:
    for file in (folder / "pairs").glob("*.txt"):
        file.write_text(file.read_text().split()[0])  # two pictures of each colour
    data = MixedData(
        shards, read_pairs([folder / "pairs"]), CONFIG, seq_len=64, mix=(0, 1), micro_batch=2,
        batches=1, seed=0,
    )  # fmt: skip
    train = data.train.parts[0].examples
    held = data.val_parts["pictures"].examples
    texts = [{e.ids[e.counted].tobytes() for e in part} for part in (train, held)]
    assert texts[0] and texts[1] and not texts[0] & texts[1]
    assert len(train) + len(held) == 12


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def test_train_generate_and_resume_with_pictures(
    folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    """The whole way: a model that names six colours from pictures it has not seen."""
    monkeypatch.chdir(folder)
    settings = {
        "seq_len": 48, "batch_size": 8, "mix": "1:3", "lr": 5e-3, "val_every": 50, "workers": 0,
        "optimizer": "adamw", "mask_patches": 0.2,
        "model": {
            "d_model": 64, "d_ff": 96, "head_dim": 16, "n_heads": 4, "n_kv_heads": 2,
            "vision_layers": 1, "vision_width": 32, "patch_size": 4, "max_patches": 4,
            "prelude_layers": 1, "core_layers": 1, "coda_layers": 0, "max_loops": 3,
        },
    }  # fmt: skip
    (folder / "c.yaml").write_text(json.dumps(settings))
    for file in (folder / "pairs").glob("*.txt"):
        file.write_text(file.read_text().split()[0])
    command = ("train", "--config", "c.yaml", "--data", shards, "--data", "pairs",
               "--steps", 60)  # fmt: skip
    code, out, err = run(*command, "--out", "runs/a")
    assert code == 0, err
    assert "Texts beside pictures" in out and "pictures: 12 records" in err
    folder_ = Path("runs/a/final")
    assert json.loads((folder_ / "preprocessor_config.json").read_text())["max_patches"] == 4
    assert "vision" in abilities(folder_)
    code, out, err = run("generate", "--image", "pairs/00.png", "--temperature", 0, "--json")
    assert code == 0, err
    assert json.loads(out)["text"].strip() == "red"
    code, out, err = run("generate", "--image", "pairs/01.png", "--image", "pairs/00.png",
                         "--show-iterations", "--max-new-tokens", 3)  # fmt: skip
    assert code == 0 and "loops a token" in out

    # Half of it, then the rest: the same weights, with augmented pictures and workers.
    code, _, err = run(*command, "--out", "runs/b", "--max-minutes", 0.0001)
    assert code == 0, err
    code, _, err = run("train", "--resume", "runs/b")
    assert code == 0, err
    one, two = (load_model(f"runs/{name}/final").model.state_dict() for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_bad_use_of_pictures(cat: Path, tmp_path: Path, run) -> None:
    text = LoopedTransformer(replace(CONFIG, vision_layers=0))
    save_model(tmp_path / "text", text, _tokenizer(), exit_settings=ExitSettings(), facts={})
    save_model(tmp_path / "both", build(), _tokenizer(), exit_settings=ExitSettings(), facts={})
    code, _, err = run("generate", "--image", cat, "--model", tmp_path / "text")
    assert code == 4 and "no vision" in err
    code, _, err = run("generate", "--image", tmp_path / "no.png", "--model", tmp_path / "both")
    assert code == 4 and "no such picture" in err
    two = ("generate", "<|image|> and <|image|>", "--image", cat, "--model", tmp_path / "both")
    code, _, err = run(*two)
    assert code == 2 and "2 <|image|> in a text for 1 pictures" in err
    code, _, err = run("tokenize", cat.parent / "cat.png", "--out", tmp_path / "out")
    assert code == 4 and "looptx train --data" in err
