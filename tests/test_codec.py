"""Codecs: quantiser, looped detokeniser, training, and the folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import codec_cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from looptx_cli.main import main
from looptx_core.checkpoint.codec_folder import load_codec, read_facts, save_codec
from looptx_core.checkpoint.header import read_header
from looptx_core.config.codec import CodecConfig
from looptx_core.config.corpus import TokenizeConfig
from looptx_core.errors import DataError, Interrupted, UsageError
from looptx_core.media.codec.codec import Codec
from looptx_core.media.codec.quantiser import Quantiser, digits_of, one_hot_digits
from looptx_core.media.image.coded import read_patches, to_picture
from looptx_core.training.codec import Order, codec_loss, from_bytes, judge_codec, train_codec
from looptx_core.training.tokenize_codec import make_codec

LEVELS = [(8, 5, 5, 5), (8, 6, 5), (7, 5, 5, 5, 5), (2, 3), (2,)]


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_comes_back_and_is_reached(levels: tuple[int, ...]) -> None:
    quantiser, count = Quantiser(levels), math.prod(levels)
    codes = torch.arange(count)
    values = quantiser.values(codes)
    assert torch.equal(quantiser.codes(values), codes)
    assert values.min() >= -1 and values.max() <= 1
    drawn = quantiser(torch.linspace(-9, 9, 2001)[:, None].expand(-1, len(levels)))
    assert [column.unique().numel() for column in drawn.T] == list(levels)
    assert torch.equal(quantiser.values(quantiser.codes(drawn)), drawn)


def test_values_are_rounded_in_float32_and_the_gradient_passes() -> None:
    quantiser = Quantiser((8, 5, 5, 5))
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantiser(x).sum().backward()
    assert x.grad is not None and (x.grad > 0).all()
    narrow = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = quantiser.codes(quantiser(narrow))
    assert torch.equal(under, quantiser.codes(quantiser(narrow.float())))


def test_digits_are_the_ones_of_a_code() -> None:
    levels = (3, 2, 4)
    ones = one_hot_digits(levels)
    assert ones.shape == (24, 9) and torch.equal(ones.sum(1), torch.full((24,), 3.0))
    assert digits_of(torch.tensor([0, 1, 3, 6, 23]), levels).tolist() == [
        [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 1, 3]
    ]  # fmt: skip
    assert ones[23].nonzero().flatten().tolist() == [2, 3 + 1, 5 + 3]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return codec_cases.build()


def test_a_state_does_not_depend_on_the_loops_that_follow(codec: Codec) -> None:
    values = codec.quantiser.values(torch.randint(0, codec.config.codes, (2, 4)))
    noisy, time = torch.randn(2, 4, codec.config.values), torch.tensor([0.0, 0.5])
    once = codec.detokeniser.predict(noisy, time, values, codec.grid, loops=1)
    states = codec.detokeniser.states(noisy, time, values, codec.grid)
    first, _ = [next(states), next(states)]
    assert torch.equal(codec.detokeniser.read(*first), once)
    twice = codec.detokeniser.predict(noisy, time, values, codec.grid, loops=2)
    assert not torch.allclose(once, twice)


def test_a_patch_sees_all_patches_and_its_place(codec: Codec) -> None:
    codes = torch.tensor([[0, 1, 2, 3]])
    whole = codec.decode(codes, codec.grid, steps=1)
    other = codec.decode(torch.tensor([[0, 1, 2, 9]]), codec.grid, steps=1)
    assert not torch.allclose(whole[:, 0], other[:, 0])
    turned = codec.decode(codes, (1, 4), steps=1)
    assert not torch.allclose(whole, turned)


def test_sampling_by_its_definition(codec: Codec) -> None:
    """Two steps of Euler with guidance from t = 0.1 on; one step is the prediction from noise."""
    codes, grid, net = torch.tensor([[5, 1, 2, 3]]), codec.grid, codec.detokeniser
    values = codec.quantiser.values(codes)
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, codec.config.values, generator=draw)
    zero, half, none = torch.zeros(1), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.bool)
    with torch.no_grad():
        start = net.predict(noise, zero, values, grid)
        z = noise + (start - noise) / 2
        seen = net.predict(z, half, values, grid)
        unseen = net.predict(z, half, values, grid, none)
    expected = unseen + 2.5 * (seen - unseen)
    found = codec.decode(codes, grid, steps=2, guidance=2.5, seed=3)
    assert torch.allclose(found, expected.clamp(-1, 1), atol=1e-6)
    once = codec.decode(codes, grid, steps=1, guidance=2.5, seed=3)
    assert torch.allclose(once, start.clamp(-1, 1), atol=1e-6)


def test_every_part_learns(codec: Codec) -> None:
    """Each parameter gets a gradient: the encoder through the rounding, too."""
    own = codec_cases.build()
    patches = from_bytes(codec_cases.pictures(16))
    codec_loss(own, patches, own.grid, torch.Generator().manual_seed(0), 0.5).backward()
    silent = [name for name, p in own.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_training_is_seeded_and_helps() -> None:
    pictures = codec_cases.pictures(48)
    settings = TokenizeConfig(steps=40, batch_size=8, lr=1e-2, seed=1)
    own = codec_cases.build()
    before = judge_codec(own, pictures)
    assert train_codec(own, pictures, settings) == 40
    report = judge_codec(own, pictures)
    assert report.psnr[1] > before.psnr[1] + 2
    assert len(report.psnr_by_loop) == 2 and report.psnr_by_loop[-1] == report.psnr[1]
    assert 0 < report.codes_used <= 1 and report.bits == 4 * math.log2(12)
    made = [codec_cases.build() for _ in range(2)]
    for each in made:
        train_codec(each, pictures, replace(settings, steps=2))
    for mine, again in zip(made[0].parameters(), made[1].parameters()):
        assert torch.equal(mine, again)


def test_an_epoch_has_each_picture_once() -> None:
    order = Order(10, 4, seed=3)
    seen = torch.cat([order.batch(step) for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert order.batch(1).tolist() == seen[4:8]  # whichever batch was asked for before


def test_pictures_become_patches_and_back(tmp_path: Path) -> None:
    config = codec_cases.CONFIG
    file = codec_cases.write_picture(tmp_path / "a.png", (200, 10, 60), size=(8, 4))
    patches = read_patches(file, config)
    assert patches.shape == (4, config.values) and patches.dtype == torch.uint8
    found = to_picture(from_bytes(patches), config)
    assert found.size == (8, 8)
    assert found.getpixel((0, 0)) == (255, 255, 255)  # a wide picture is whole, on white
    assert found.getpixel((4, 4)) == (200, 10, 60)
    with pytest.raises(DataError, match="no such picture"):
        read_patches(tmp_path / "none.png", config)


def test_a_codec_comes_back_from_its_folder(codec: Codec, tmp_path: Path) -> None:
    fingerprint = save_codec(tmp_path / "c", codec, {"steps": 3})
    again, found = load_codec(tmp_path / "c")
    assert found == fingerprint and again.config == codec.config
    patches = from_bytes(codec_cases.pictures(5))
    codes = codec.encode(patches, codec.grid)
    assert torch.equal(again.encode(patches, codec.grid), codes)
    assert torch.equal(again.decode(codes, codec.grid), codec.decode(codes, codec.grid))
    assert json.loads((tmp_path / "c/codec.json").read_text())["facts"] == {"steps": 3}
    other = codec_cases.build(seed=1)
    assert save_codec(tmp_path / "d", other, {}) != fingerprint


def _cut(folder: Path) -> None:
    file = folder / "codec.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _nan(folder: Path) -> None:
    weights = load_file(folder / "codec.safetensors")
    weights["detokeniser.out.bias"][0] = math.nan
    save_file(weights, folder / "codec.safetensors")


def _flipped(folder: Path) -> None:
    weights = load_file(folder / "codec.safetensors")
    weights["detokeniser.out.bias"][0] += 1
    save_file(weights, folder / "codec.safetensors")


def _shape(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "codec.json").read_text())
        document["shape"] |= values
        (folder / "codec.json").write_text(json.dumps(document))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, "not a whole safetensors file"),
        (_nan, "holds NaN or infinity"),
        (_flipped, "fingerprint is not of its shape and weights"),
        (_shape(max_loops=3), "fingerprint is not of its shape and weights"),
        (_shape(width=16), "asks for float|but config.json asks"),
        (_shape(core_layers=900), "more than codec.safetensors holds"),
        (_shape(levels=[1]), "levels"),
        (_shape(colour="red"), "unknown colour"),
        (lambda folder: (folder / "codec.json").unlink(), "codec.json is missing"),
        (lambda folder: (folder / "codec.json").write_text("{"), "codec.json"),
    ],
)
def test_damaged_codecs(
    codec: Codec, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    save_codec(tmp_path / "c", codec, {})
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=says):
        load_codec(tmp_path / "c")


@pytest.mark.parametrize(
    "wrong",
    [{"levels": (1, 5)}, {"width": 20}, {"rows": 0}, {"values": 50}, {"levels": (256,) * 4},
     {"core_layers": 0}],
)  # fmt: skip
def test_shapes_that_fit_no_codec(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="codec: "):
        replace(codec_cases.CONFIG, **wrong)


def test_an_interrupted_training_keeps_what_it_learned(tmp_path: Path) -> None:
    codec_cases.write_pictures(tmp_path / "pictures", 8)
    settings = TokenizeConfig(data=(str(tmp_path / "pictures"),), steps=9, batch_size=4)

    def stop(stage: str, done: int, of: int, loss: float | None) -> None:
        if (stage, done) == ("train", 2):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="stopped at step 2 of 9"):
        make_codec(settings, codec_cases.CONFIG, tmp_path / "c", stop)
    load_codec(tmp_path / "c")
    assert read_facts(tmp_path / "c") == {"steps": 2, "pictures": 7}


def test_the_command_trains_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    codec_cases.write_pictures(tmp_path / "pictures", 12)
    shape = {**asdict(codec_cases.CONFIG), "levels": [3, 2, 2]}
    (tmp_path / "c.yaml").write_text(json.dumps({"codec_model": shape, "batch_size": 4}))
    command = ["tokenize", "--codec", "picture", "pictures", "--config", "c.yaml"]
    assert main([*command, "--steps", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["codes"] == 12 and found["tokens"] == 4 and found["steps"] == 3
    assert set(found["psnr"]) == {"1", "8"} and len(found["psnr_by_loop"]) == 2
    assert Path(found["out"]).name == "codec-1"
    _, fingerprint = load_codec(found["out"])
    assert fingerprint == found["fingerprint"]
    stored = read_header(Path(found["out"], "codec.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}
    assert main([*command, "--steps", "2", "--out", found["out"], "--overwrite"]) == 0
    assert "PSNR" in capsys.readouterr().out
    for arguments, code, says in (
        (["tokenize", "--codec", "picture"], 2, "needs pictures"),
        (["tokenize", "--codec", "song", "pictures"], 2, "expected picture"),
        (["tokenize", "pictures", "--steps", "3"], 2, "add --codec picture"),
        ([*command, "--set", "codec_model.levels=1,2"], 2, "levels"),
        ([*command, "--set", "codec_model.levels=4,2", "--steps", "1", "--lr", "1e30",
          "--out", "x"], 1, "lower --lr"),
        ([*command, "--set", "codec_model.levels=4,2", "--steps", "1", "--out", "x"], 0, ""),
    ):  # fmt: skip
        assert main(arguments) == code, arguments
        assert says in capsys.readouterr().err
    assert load_codec("x")[0].config.levels == (4, 2)
    assert CodecConfig().codes == 1000
