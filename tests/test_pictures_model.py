"""Pictures in the model: laid out, seen, and drawn from their other patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from picture_cases import CONFIG, IMG, build, letters, png, row

from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.run import TrainConfig
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.media.batch import MediaBatch, hidden_numbers, hide, lay_out
from looptx_core.media.image.masked import reconstruct
from looptx_core.media.image.read import read_picture
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rope import rotary_tables
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss


def pictures(*grids: tuple[int, int]) -> MediaBatch:
    count = sum(r * c for r, c in grids)
    reconstruct = torch.Generator().manual_seed(5)
    patches = torch.rand(
        count, 3 * CONFIG.patch_size**2, generator=reconstruct, dtype=torch.float64
    )
    return MediaBatch(patches * 2 - 1, torch.tensor(grids))


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
    found = lay_out(tokens, {"image": pictures((2, 3))}, CONFIG)
    assert found.positions[0, 0].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 5]
    assert found.positions[1, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5]
    assert found.groups[0].tolist() == [-1, 0, 0, 0, 0, 0, 0, -1, -1]
    assert found.ends.tolist() == [6]


def test_layout_of_two_pictures_side_by_side_and_padding() -> None:
    tokens = torch.tensor([row(0, 0, (1, 2), (2, 1), 7)])
    found = lay_out(tokens, {"image": pictures((1, 2), (2, 1))}, CONFIG, torch.tensor([2]))
    assert found.positions[0, 0].tolist() == [0, 0, 0, 0, 2, 3, 4]
    assert found.positions[1, 0].tolist() == [0, 0, 0, 1, 2, 2, 4]
    assert found.groups[0].tolist() == [-1, -1, 0, 0, 1, 1, -1]


@pytest.mark.parametrize("ids", [row(9, (2, 2), 8), row(9, 2, 8, 2, 2, 2, 2, 2)])
def test_image_tokens_that_do_not_match(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="image tokens"):
        lay_out(torch.tensor([ids]), {"image": pictures((2, 3))}, CONFIG)


# The model


def test_patches_are_told_apart_by_their_places_alone() -> None:
    """Permuted patches change the result; permuted together with their places they do not."""
    model = build(replace(CONFIG, prelude_layers=1))
    seen = pictures((3, 4))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([row(9, (3, 4), 8)])
    shuffled = MediaBatch(seen.features[order], seen.grids)
    plain = model(tokens, 3, media={"image": seen}).logits[0, -1]
    assert (model(tokens, 3, media={"image": shuffled}).logits[0, -1] - plain).abs().max() > 1e-3

    def moved(patches: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        layout = model.layout(tokens, {"image": seen})
        assert layout is not None
        layout.positions[:, :, 1:13] = layout.positions[:, :, 1:13][:, :, places]
        ctx = model.context(14, layout=layout)
        x = model.embedding(tokens)
        x[0, 1:13] = patches
        for block in model.prelude:
            x = block(x, ctx)
        state = model.step(x, x, 1, ctx)
        return model.coda_hidden(state, ctx)[0, -1]

    encoded = model.vision(seen)
    together_ = moved(encoded[order], order)
    torch.testing.assert_close(together_, moved(encoded, torch.arange(12)), rtol=0, atol=1e-9)
    assert (moved(encoded[order], torch.arange(12)) - together_).abs().max() > 1e-3


def test_the_encoder_knows_rows_from_columns() -> None:
    encoder = build().vision
    assert encoder is not None
    seen = pictures((2, 3))
    turned = MediaBatch(seen.features, torch.tensor([[3, 2]]))
    assert (encoder(seen) - encoder(turned)).abs().max() > 1e-3


def test_the_encoder_keeps_pictures_apart() -> None:
    encoder = build().vision
    assert encoder is not None
    both = pictures((2, 3), (1, 4))
    each = [
        encoder(MediaBatch(both.features[:6], both.grids[:1])),
        encoder(MediaBatch(both.features[6:], both.grids[1:])),
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
    whole = model(tokens, loops, media={"image": seen}).logits
    cache = LoopCache(model.config, 1, tokens.shape[1], loops, dtype=torch.float64)
    parts = [model(tokens[:, :15], loops, cache, media={"image": seen}).logits]
    parts += [model(tokens[:, i : i + 1], loops, cache).logits for i in range(15, 18)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


def test_patches_see_later_ones_of_their_own_picture_only() -> None:
    """Two patches of a later row change what an earlier patch becomes; a later text does not."""
    model, seen = build(), pictures((2, 2), (2, 2))
    tokens = torch.tensor([row(9, (2, 2), 8, (2, 2), 7)])

    def first(images: MediaBatch, ids: torch.Tensor = tokens) -> torch.Tensor:
        layout = model.layout(ids, {"image": images})
        ctx = model.context(ids.shape[1], layout=layout)
        x = model.embedding(ids)
        x[0, 1:5], x[0, 6:10] = images.features[:4, :32], images.features[4:, :32]
        return model.step(x, x, 1, ctx)[0, 1]

    before = first(seen)
    for patch, changes in ((3, True), (7, False)):
        other = seen.features.clone()
        other[patch] += 1
        changed = (first(MediaBatch(other, seen.grids)) - before).abs().max() > 1e-9
        assert changed == changes


def test_a_batch_of_pictures_and_text_equals_single_runs(cat: Path) -> None:
    model = build()
    tokenizer = letters()
    engine = Engine(model, tokenizer, ExitSettings(confidence=0.5))
    picture = read_picture(cat, CONFIG)
    small = read_picture(png((40, 8)), CONFIG)
    prompts = [
        MediaPrompt("", (picture,)),
        "abc",
        MediaPrompt("ab<|image|>c<|image|>d", (picture, small)),
    ]
    options = GenerationOptions(max_new_tokens=6, temperature=0, ignore_eos=True)
    for loops in ("auto", 3):
        asked = replace(options, loops=loops)
        batch = engine.complete(prompts, asked)
        single = [engine.complete([prompt], asked)[0] for prompt in prompts]
        for one, other in zip(batch, single):
            assert [(s.id, s.loops) for s in one.tokens] == [(s.id, s.loops) for s in other.tokens]


# Hidden patches


def test_a_hidden_patch_is_not_seen_and_the_others_are() -> None:
    encoder = build(replace(CONFIG, reconstruct=True)).vision
    assert encoder is not None
    seen, hidden = pictures((2, 3), (1, 2)), torch.zeros(8, dtype=torch.bool)
    hidden[4] = hidden[7] = True
    before = encoder(replace(seen, hidden=hidden))
    for patch in range(8):
        other = seen.features.clone()
        other[patch] += 1
        moved = (encoder(MediaBatch(other, seen.grids, hidden)) - before).abs().amax(1)
        own = slice(0, 6) if patch < 6 else slice(6, 8)
        assert (moved[own].max() < 1e-12) == bool(hidden[patch])
        assert (encoder(MediaBatch(other, seen.grids)) - encoder(seen)).abs().max() > 1e-3


def test_hidden_patches_are_learned_to_be_drawn_from_the_others() -> None:
    """Pictures of one patch again and again; a confidence that tells these from noise."""
    config = replace(CONFIG, reconstruct=True, max_loops=2)
    torch.manual_seed(0)
    model = LoopedTransformer(config)
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=2), 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    grid, tokens = torch.tensor([[2, 3]] * 8), torch.tensor([row(9, (2, 3), 8, 7)] * 8)
    of_noise = torch.arange(8) % 2 == 1

    def some() -> MediaBatch:
        base = torch.rand(8, 1, 3).mul(2).sub(1)
        stripes = torch.where(torch.arange(16)[:, None] % 4 < 2, base, -base)
        even = stripes.reshape(8, 1, 48).expand(8, 6, 48)
        noise = torch.rand(8, 6, 48) * 2 - 1
        patches = torch.where(of_noise[:, None, None], noise, even)
        return hide({"image": MediaBatch(patches.reshape(48, 48), grid)}, {"image": 0.4})["image"]

    errors = []
    for step in range(200):
        drawn = some()
        found = loop_loss(model, tokens, schedule, step, torch.arange(8), media={"image": drawn})
        optimizer.zero_grad()
        (found.loss + found.confidence_loss).backward()
        optimizer.step()
        errors.append(float(found.restored))
    assert sum(errors[:5]) / 5 > 0.85
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for _ in range(8):
        drawn = some()
        places = hidden_numbers(tokens, IMG, drawn.hidden)
        state = model(tokens, 2, media={"image": drawn}).state
        result = reconstruct(model.patch_head, model.norm(state), places, drawn)
        pictures = (places >= 0).nonzero()[:, 0]
        for number, *both in zip(pictures, result.error, result.logit):
            seen[bool(of_noise[number])].append(torch.stack(both).detach())
    (error, logit), (error_of_noise, logit_of_noise) = (
        torch.stack(seen[noisy]).mean(0) for noisy in (False, True)
    )
    assert error < 0.8 < 0.95 < error_of_noise
    assert logit > logit_of_noise + 1


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


def test_a_model_takes_the_weights_of_one_that_reads_less() -> None:
    """Media are added to a trained model; another shape is refused."""
    from looptx_core.media.registry import MEDIA
    from looptx_core.training.start import copy_weights

    text = LoopedTransformer(replace(CONFIG, vision_layers=0)).eval()
    sees = LoopedTransformer(MEDIA["image"].enable(text.config)).eval()
    start: Any = SimpleNamespace(model=text, name="before", config=text.config)
    tokens = torch.arange(10, 18)[None]
    with torch.no_grad():
        before = [*sees.states(tokens, 2)][-1]
        new = copy_weights(sees, start)
        expected, found = ([*m.states(tokens, 2)][-1] for m in (text, sees))
    assert torch.equal(expected, found) and not torch.equal(before, found)
    assert new and all(name.startswith("vision.") for name in new)
    for change, named in (({"d_ff": 8}, "gate_proj"), ({"coda_layers": 2}, "coda")):
        with pytest.raises(UsageError, match=named):
            copy_weights(LoopedTransformer(replace(text.config, **change)), start)
