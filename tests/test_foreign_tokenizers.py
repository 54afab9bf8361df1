"""Tokenizers that others made: their spaces, beginnings and ends."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

SHAPE = ModelConfig(
    vocab_size=32, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_seq_len=64,
    core_layers=1, loops=1, max_loops=2,
)  # fmt: skip
WORDS = ["<s>", "</s>", "▁It", "▁was", "▁the", "▁best", "▁of", "▁times", "▁worst", "▁age"]


def spaced(prepend: bool) -> Tokenizer:
    """One that writes a space before a text: by Metaspace, or as Llama 2's, by a normalizer."""
    vocab = {word: i for i, word in enumerate([*WORDS, "s", "ing"])}
    found = Tokenizer(models.WordLevel(vocab, unk_token="s"))
    found.add_special_tokens(["<s>", "</s>"])
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if prepend else "first")
    found.decoder = decoders.Metaspace(prepend_scheme="first")
    if prepend:
        found.normalizer = normalizers.Prepend("▁")
        found.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return found


def drawn() -> LoopedTransformer:
    torch.manual_seed(1)
    model = LoopedTransformer(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("prepend", [False, True])
def test_prompt_and_continuation_are_what_the_ids_decode_to(prepend: bool) -> None:
    tokenizer = spaced(prepend)
    engine = Engine(drawn(), tokenizer)
    options = GenerationOptions(temperature=1.0, max_new_tokens=12, ignore_eos=True)
    for prompt in ("It was", "the age of", ""):
        [found] = engine.complete([prompt], options)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        assert prompt + found.text == tokenizer.decode([*ids, *(t.id for t in found.tokens)])
        assert found.text.startswith(" ") == bool(prompt)
