"""An export under transformers' own training and generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_conversion import TOKENS, exported, model  # noqa: F401, fixtures

transformers = pytest.importorskip("transformers")
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def export(exported: Path) -> torch.nn.Module:  # noqa: F811
    return transformers.AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True
    ).eval()


def test_accumulated_losses_are_the_mean(export: torch.nn.Module) -> None:
    """Trainer counts the targets of all batches of a step, and hands the number in."""
    labels = TOKENS.clone()
    labels[0, :9] = -100  # the rows count differently
    whole = export(TOKENS, labels=labels).loss
    count = int((labels[:, 1:] != -100).sum())
    for number in (count, torch.tensor(count)):
        parts = [
            export(TOKENS[row][None], labels=labels[row][None], num_items_in_batch=number).loss
            for row in (0, 1)
        ]
        assert abs(sum(parts) - whole) < 1e-5
    assert abs(parts[0] - whole) > 0.1, "the case is too easy"


def test_a_trainer_that_accumulates(export: torch.nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    state = {name: value.clone() for name, value in export.state_dict().items()}
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in TOKENS.repeat(2, 1)]
    found = []
    for rows, accumulate in ((4, 1), (1, 4)):
        export.load_state_dict(state)
        args = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate,
            max_steps=1, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, max_grad_norm=1e9, optim="sgd", seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=export, train_dataset=data, args=args,
            data_collator=transformers.default_data_collator,
        )  # fmt: skip
        trainer.train()
        log = next(line for line in trainer.state.log_history if "grad_norm" in line)
        found.append((log["loss"], log["grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_logits_of_the_places_that_are_asked_for(export: torch.nn.Module) -> None:
    full = export(TOKENS, loops=2).logits
    assert full.shape[1] == TOKENS.shape[1]
    assert torch.equal(export(TOKENS, loops=2, logits_to_keep=3).logits, full[:, -3:])
    places = torch.tensor([0, 5, 16])
    kept = export(TOKENS, loops=2, logits_to_keep=places).logits
    assert (kept - full[:, places]).abs().max() < 1e-5


@pytest.mark.parametrize("loops", [None, 3])
@pytest.mark.parametrize("how", ["lookup", "assisted"])
def test_drafts_change_no_greedy_text(export: torch.nn.Module, how: str, loops: int | None) -> None:
    prompt = TOKENS[:1, :4].repeat(1, 4)  # in which a lookup finds something
    depth = {"loops": loops} if loops else {}
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": export}
    plain = export.generate(prompt, **GREEDY, **depth)
    assert torch.equal(export.generate(prompt, **GREEDY, **depth, **options), plain)


def test_a_crop_of_nothing(export: torch.nn.Module) -> None:
    from transformers import GenerationConfig

    out = export.generate(TOKENS[:1], **GREEDY, return_dict_in_generate=True)
    assert isinstance(export.generation_config, GenerationConfig)
    cache = out.past_key_values
    length = cache.get_seq_length()
    cache.crop(0)
    assert cache.get_seq_length() == length > 0
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    cache.crop(5)
    assert cache.get_seq_length() == 5
