"""Finetuning on chats: the template that is trained, and talking by it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from finetuning_cases import QUICK, write

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, read_chat_template
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.data.chat import ROLES, ChatTemplate, chat_prompt
from looptx_core.data.examples import read_examples
from looptx_core.data.tokenizer import END
from looptx_core.errors import DataError
from looptx_core.finetuning.run import finetune, prepare


def test_the_chat_template_is_the_one_that_was_trained(tiny: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "a <|end|>?"}]
    data = write(tmp_path / "chat.jsonl",
                 *[{"messages": [*asked, {"role": "assistant", "content": "b"}]}] * 4)  # fmt: skip
    (tmp_path / "run").mkdir()
    config = FinetuneConfig(**(QUICK | {"steps": 1}), lora=True)
    result = finetune(prepare(config, base=tiny, data=[data]), folder=tmp_path / "run")
    assert read_chat_template(result.model_folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(result.model_folder)
    plain = [asked[0], {"role": "user", "content": "a?"}]
    ours = load_model(tiny).tokenizer
    assert chat_prompt(plain, ours) == theirs.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=False
    )
    # A user can't spell a marker: it stays so many characters.
    assert chat_prompt(asked, ours).count(ours.token_to_id(END)) == 0


TEMPLATE = (
    "{{ '<|system|>Be good.' }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{{ m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Of another's shape: a system prompt of its own, lines, and a line's end after each turn."""


def test_chats_are_trained_by_the_models_own_template(tiny: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (base / "digests.json").unlink(missing_ok=True)
    loaded = load_model(base)
    assert loaded.chat is not None
    said = [("user", "Who?"), ("assistant", "Ann."), ("user", "And?"), ("assistant", "Bob it is.")]
    chat = [{"role": role, "content": content} for role, content in said]
    data = write(tmp_path / "chat.jsonl", *[{"messages": chat}] * 4)
    example = read_examples([data], loaded.tokenizer, seq_len=64, chat=loaded.chat).kept[0]
    theirs = PreTrainedTokenizerFast.from_pretrained(base)
    written = theirs.apply_chat_template(chat, return_dict=False)
    assert example.ids.tolist() == written[: len(example.ids)]
    answers = [loaded.tokenizer.encode(said[n][1]).ids for n in (1, 3)]
    end = loaded.tokenizer.token_to_id(END)
    assert example.ids[example.counted].tolist() == [*answers[0], end, *answers[1], end]
    # What is asked is how an answer begins in training.
    asked = loaded.chat.prompt(chat[:3], loaded.tokenizer)
    assert example.ids[: len(asked)].tolist() == asked
    (tmp_path / "run").mkdir()
    config = FinetuneConfig(**(QUICK | {"steps": 1}), lora=True)
    result = finetune(prepare(config, base=base, data=[data]), folder=tmp_path / "run")
    assert result.answers is not None and result.answers.shown[0].expected == "Bob it is."
    assert read_chat_template(result.model_folder) == TEMPLATE


def test_a_response_ends_with_a_token_at_which_generation_stops(tiny: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    other = load_model(tiny).tokenizer.token_to_id(ROLES["system"])
    settings = json.loads((base / "generation_config.json").read_text())
    text = json.dumps(settings | {"eos_token_id": [other]})
    (base / "generation_config.json").write_text(text)
    (base / "digests.json").unlink(missing_ok=True)
    data = write(tmp_path / "data.jsonl", *[{"prompt": "a", "response": "b"}] * 4)
    said: list[str] = []
    config = FinetuneConfig(**QUICK, lora=True, max_loops=1)
    prepared = prepare(config, base=base, data=[data], judge=False, report=said.append)
    assert sum("only the first of the model's 3" in line for line in said) == 1
    assert prepared.base.end == other
    assert {example.ids[-1] for example in prepared.batches.train.examples} == {other}


def test_a_chat_that_its_template_can_not_hold(tiny: Path) -> None:
    tokenizer = load_model(tiny).tokenizer
    chat = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    last = ChatTemplate("{% for m in messages %}{{ loop.revindex ~ m.content }}{% endfor %}", {})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* differently once others follow"):
        last.turns(chat, tokenizer, "a.jsonl:1")
    first = ChatTemplate("{% if messages %}Be good. {% endif %}" + TEMPLATE, {})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* begin this record with one of the user"):
        first.turns(chat[1:], tokenizer, "a.jsonl:1")
    spelled = [{"role": "user", "content": END}, chat[1]]
    with pytest.raises(DataError, match=r"a\.jsonl:1: a message spells <.end.>"):
        last.turns(spelled, tokenizer, "a.jsonl:1")


@pytest.fixture(scope="module")
def talker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was finetuned on a chat of two turns."""
    place = tmp_path_factory.mktemp("chats")
    said = [("user", "Hello"), ("assistant", "Good day."), ("user", "More"), ("assistant", "No.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in said]}
    data = write(place / "chats.jsonl", *[chat] * 16)
    (place / "run").mkdir()
    config = FinetuneConfig(**(QUICK | {"steps": 60, "val_every": 60, "save_every": 60}), lora=True)
    finetune(prepare(config, base=tiny, data=[data]), folder=place / "run")
    return place / "run"


def test_a_chat_is_asked_by_its_template(talker: Path, capsys) -> None:
    ask = ["generate", "--adapter", str(talker), "--temperature", "0", "Hello", "--max-new-tokens"]
    assert main([*ask, "20", "--json", "--chat"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["text"], found["finish_reason"]) == ("Hello", "Good day.", "end")
    assert main([*ask, "20", "--chat"]) == 0
    assert capsys.readouterr().out == "Good day.\n"
    assert main([*ask, "20", "--chat", "Hello"]) == 0
    assert capsys.readouterr().out == "Good day.\nGood day.\n"
    # Without the template it is a text to go on with.
    assert main([*ask, "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] < found["prompt_tokens"]


def test_a_terminal_talks_by_turns(talker: Path, tiny: Path, capsys, monkeypatch) -> None:
    def session(*lines: str, model: tuple[str, ...] = ("--adapter", str(talker))) -> list[str]:
        typed = iter(lines)

        def read(_: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        assert main(["generate", *model, "--temperature", "0", "--max-new-tokens", "20"]) == 0
        return capsys.readouterr().out.splitlines()

    assert session("Hello", "More", "/new", "Hello") == ["Good day.", "No.", "Good day.", ""]
    # A line that is too long is refused and forgotten; the talk goes on.
    assert session("ab" * 300, "Hello")[-2:] == ["Good day.", ""]
    # The oldest turns give way to the newest.
    assert len(session(*["Hello"] * 40)) == 41
    assert session("Hello", model=("--model", str(tiny)))  # a text, gone on with


def test_no_chat_with_a_model_that_learned_none(tiny: Path, capsys) -> None:
    assert main(["generate", "--model", str(tiny), "--chat", "Hello"]) == 2
    assert "not finetuned on chats" in capsys.readouterr().err
