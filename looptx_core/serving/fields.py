"""The fields of requests: what is supported, what is neutral, and how they become options.

No field is ignored in silence. One that would change the answer and is not supported may only have
a value that changes nothing; any other value, and any other field, is an error with its name.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import fields as dataclass_fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import core_schema

from looptx_core.config.generation import ExitRule, GenerationOptions
from looptx_core.documents import has_half
from looptx_core.serving.errors import ApiError, bad_field

MOST_CHOICES = 128
MOST_SEED = 2**63 - 1
MOST_STOP = 256
"""Characters of a stop string, which is looked for after every token."""


class Neutral:
    """Marks a field that is not supported: it may be null, or have a value that changes nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._check, core_schema.any_schema())

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> Any:
        for own in (None, *self.values):
            if value == own and isinstance(value, bool) == isinstance(own, bool):
                return value
        raise ValueError("is not supported here; leave it out")


def _whole(text: str) -> str:
    if has_half(text):
        raise ValueError("is not Unicode: it has half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Text, Field(max_length=MOST_STOP)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """JSON of exactly these keys and types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = False
    include_obfuscation: bool | None = None
    """Passes: it pads chunks, and no chunk is padded here."""


class Asked(Strict):
    """What completions and chats have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED - 1, le=MOST_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0

    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    loops: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    exit: ExitRule | None = None
    threshold: float | None = None
    min_loops: Annotated[int, Field(ge=1)] | None = None
    max_loops: Annotated[int, Field(ge=1)] | None = None
    speculate: Annotated[int, Field(ge=0, le=64)] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None

    frequency_penalty: Annotated[Any, Neutral(0)] = None
    presence_penalty: Annotated[Any, Neutral(0)] = None
    logit_bias: Annotated[Any, Neutral({})] = None
    user: Any = None
    """Passes: it names who asks, and changes no answer."""

    def check(self) -> None:
        """Raise `ApiError` for fields that others leave without effect."""
        fixed = "speculate" if self.speculate else "loops"
        if self.speculate or self.loops not in (None, "auto"):
            without = ["exit", "threshold", "min_loops"]
            # The deepest loop is the full depth of drafts where `loops` gives none.
            without += ["max_loops"] if self.loops not in (None, "auto") else []
            for name in without:
                if getattr(self, name) is not None:
                    raise bad_field(
                        name, f"{name} has no effect beside {fixed}, which fixes the depth; "
                        "leave one of them out"
                    )  # fmt: skip
        if self.reasoning_effort is not None and (
            self.loops not in (None, "auto") or self.max_loops is not None
        ):
            raise bad_field(
                "reasoning_effort",
                "reasoning_effort sets the most loops; leave out loops and max_loops",
            )
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options", "stream_options needs stream; set it to true")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def options(self, deepest: int, most: int) -> list[GenerationOptions]:
        """The options of each choice. deepest: the model's loops. most: tokens to generate.

        Raises `ApiError` as `check` does.
        """
        self.check()
        given = {field.name for field in dataclass_fields(GenerationOptions)} - {"seed"}
        values = {name: getattr(self, name) for name in given & type(self).model_fields.keys()}
        values = {name: value for name, value in values.items() if value is not None}
        values |= {"stop": self.stops, "max_new_tokens": max(1, most)}
        values["temperature"] = 1.0 if self.temperature is None else self.temperature
        if self.reasoning_effort is not None:
            values["max_loops"] = effort(self.reasoning_effort, deepest)
            if self.min_loops is not None:
                values["min_loops"] = min(self.min_loops, values["max_loops"])
        first = secrets.randbelow(2**32) if self.seed is None else self.seed
        return [
            GenerationOptions(**values, seed=(first + number) % (MOST_SEED + 1))
            for number in range(self.n or 1)
        ]


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]] = Field(default="")
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """How many tokens have to fit after the prompt; absent: 16, or as many as fit."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = False
    best_of: Any = None
    suffix: Annotated[Any, Neutral("")] = None

    def prompts(self) -> list[str | list[int]]:
        found: Any = self.prompt
        if isinstance(found, str) or (found and isinstance(found[0], int)):
            found = [found]
        if not found:
            raise bad_field("prompt", "prompt is an empty list; give a text or token ids")
        if len(found) * (self.n or 1) > MOST_CHOICES:
            raise bad_field("n", f"prompts times n: at most {MOST_CHOICES} choices a request")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_field("best_of", "best_of is not supported here; leave it out")
        return found


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[dict[str, Any]] | None = None
    name: Annotated[Any, Neutral()] = None
    refusal: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral()] = None
    audio: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    tools: Annotated[Any, Neutral([])] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    web_search_options: Annotated[Any, Neutral()] = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    store: Annotated[Any, Neutral(False)] = None
    moderation: Annotated[Any, Neutral()] = None
    metadata: Any = None
    """These pass: they change no answer."""
    parallel_tool_calls: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def check(self) -> None:
        super().check()
        given = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(given) > 1:
            raise bad_field(
                "max_tokens", "max_tokens and max_completion_tokens differ; leave one of them out"
            )
        if self.top_logprobs and not self.logprobs:
            raise bad_field("top_logprobs", "top_logprobs needs logprobs; set it to true")

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        """The field that says how many tokens have to fit after the prompt, and its value."""
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens


class TokenizeAsked(Strict):
    """POST /tokenize. The opening tokens of a prompt are those of `/v1/completions`."""

    model: str | None = None
    prompt: Text
    add_special_tokens: bool | None = True


class DetokenizeAsked(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class ExitAsked(Strict):
    """POST /looptx/exit: another threshold for an answer that is being written."""

    id: str
    threshold: float


def effort(word: str, deepest: int) -> int:
    """The most loops of a token: 2 at low, half of the model's at medium, all at high."""
    return {"low": min(2, deepest), "medium": math.ceil(deepest / 2), "high": deepest}[word]


def check_model(asked: str | None, name: str) -> None:
    """Raise `ApiError` for a model that is not served."""
    if asked not in (None, "", name):
        told = f"the model of this server is {name}; ask for that, or leave `model` out"
        raise ApiError(404, told, "model", "model_not_found")
