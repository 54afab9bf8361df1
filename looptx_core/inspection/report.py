"""An inspection from a model and its data to one JSON document, which all figures are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from looptx_core.checkpoint.atomic import write_folder
from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.inspection import InspectConfig
from looptx_core.data.probes import probe_batches, read_probes
from looptx_core.data.shards import Shards
from looptx_core.data.tokenizer import end_id, opening_ids
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine
from looptx_core.inspection.frontier import (
    Point,
    cheapest_fixed,
    choose,
    frontier,
    rule_depths,
)
from looptx_core.inspection.measure import measure_records, measure_text
from looptx_core.inspection.media import inspect_media
from looptx_core.inspection.survey import Survey, survey_lines
from looptx_core.inspection.trace import trace_text
from looptx_core.media.registry import MEDIA
from looptx_core.model.cache import POLICIES
from looptx_core.training import metrics
from looptx_core.training.calibration import calibrate
from looptx_core.training.evaluate import evaluate_loops

if TYPE_CHECKING:  # looking at text needs no trainer
    from looptx_core.data.datamodule import Batches

SCHEMA_VERSION = 1
SHOWN_INCREASE = 0.005
"""The rise of the loss at which rules are compared where none is asked for."""
_DECODED_TEXT = 128  # tokens of one text, prompt included
_PROMPT = 16
_LEVEL = 1e-3  # a share of the loss, below which what is smaller or simpler is worth more
_POINTS = 5e-3  # of the accuracy, the same
_NEXT = 0.1  # of a loop, which deciding when to stop may cost

Document = dict[str, Any]


def inspect_loops(
    loaded: LoadedModel,
    data: Path | Batches,
    config: InspectConfig,
    report: Callable[[str], object] = lambda line: None,
    name: str = "",
) -> tuple[Document, ExitSettings]:
    """Measure a model on the held-out split of shards, or of its own records.

    name: of records, for the document. Cache policies and lines that need depth come with shards.
    Returns the document, and the model's exit settings, calibrated on one half of the sequences,
    with the picked rule and, if texts are decoded, the better cache policy where
    `target_loss_increase` asks for one. All figures come from the other half.
    """
    model, stored = loaded.model, loaded.exit
    loops = config.max_loops or model.config.max_loops
    if config.seq_len > model.config.max_seq_len:
        raise UsageError(
            f"--seq-len {config.seq_len}: the model's context holds {model.config.max_seq_len}"
        )
    report("measuring every loop")
    shards, tasks = None, []
    if isinstance(data, Path):
        fit, shown, tokens_per_byte, shards = measure_text(loaded, data, config, loops)
    else:
        fit, shown, tokens_per_byte = measure_records(loaded, data, config, loops)
    settings = calibrate(stored, fit.evaluation)
    context = config.seq_len / 2
    to_choose = frontier(fit, settings, model.config, context)
    increase = SHOWN_INCREASE if config.allowed_increase is None else config.allowed_increase
    choice = choose(to_choose, _mean(fit.loss[-1]), increase)
    if choice is not None and config.allowed_increase is not None:
        settings = choice.settings(settings)
    if isinstance(data, Path) and shards is not None:
        tasks = _tasks(loaded, data, shards, settings, loops)
    document: Document = {
        "schema_version": SCHEMA_VERSION,
        "model": str(loaded.folder),
        "data": name or str(data),
        "tokens": shown.evaluation.tokens,
        "tokens_to_calibrate": fit.evaluation.tokens,
        "loops": loops,
        **_by_loop(shown, tokens_per_byte),
        **_confidence(shown, stored, settings),
        "frontier": [asdict(point) for point in frontier(shown, settings, model.config, context)],
        "choice": _chosen(shown, settings, choice, increase, model.config, context),
        "tasks": tasks,
        "kv_policies": [],
        "as_good": None,
        "trace": None,
        **{medium.plural: [] for medium in MEDIA.values()},
    }
    if config.decode_tokens and shards is not None:
        report("decoding with real exits, for each cache policy")
        document["kv_policies"] = _policies(
            loaded,
            shards,
            settings,
            config.decode_tokens,
            fixed=int(document["choice"]["fixed"]["mean_loops"]),
        )
    if found := document["kv_policies"]:
        if choice is not None and config.allowed_increase is not None:
            settings = replace(settings, kv_policy=_policy(found))
        document["as_good"] = _as_good(found, settings.kv_policy, document["tasks"])
    if config.text is not None or config.prompt is not None:
        report("tracing")
        tokens = _text(loaded, settings, config)
        document["trace"] = trace_text(
            model, loaded.tokenizer, tokens, settings, loops, config.seed
        )
    if config.media:
        report("looking at the " + ", ".join(MEDIA[name].plural for name in config.media))
        document |= inspect_media(loaded, config.media, settings, loops)
    return document, settings


def write_report(document: Document, folder: Path) -> None:
    """report.json, the figures, and report.html with all of it inside, whole or not at all."""
    from looptx_core.inspection.figures import plot_figures
    from looptx_core.inspection.page import page

    def write(place: Path) -> None:
        marked = {**document, "command": "inspect-loops"}
        (place / "report.json").write_text(json.dumps(marked, indent=1) + "\n", "utf-8")
        figures = plot_figures(document, place)
        (place / "report.html").write_text(page(document, figures), "utf-8")

    write_folder(folder, write)


def _by_loop(survey: Survey, tokens_per_byte: float) -> Document:
    loss, hit = survey.loss.double(), survey.hit.bool()
    before, after = hit[:-1], hit[1:]
    kl, change = (
        part[1:].double().mean(1).tolist() for part in (survey.read["kl"], survey.evaluation.change)
    )
    return {
        "loss_by_loop": loss.mean(1).tolist(),
        "bits_per_byte_by_loop": (loss.mean(1) / math.log(2) * tokens_per_byte).tolist(),
        "accuracy_by_loop": hit.double().mean(1).tolist(),
        # From the second loop on: what a further loop mends, and what it breaks (overthinking).
        "fixed_by_loop": (~before & after).double().mean(1).tolist(),
        "broken_by_loop": (before & ~after).double().mean(1).tolist(),
        "kl_by_loop": kl,
        "state_change_by_loop": change,
        "state_norm_by_loop": survey.evaluation.norm_by_loop,
    }


def _confidence(survey: Survey, stored: ExitSettings, settings: ExitSettings) -> Document:
    """Calibration and discrimination where tokens stop, and by loop.

    `before`: as the head says it. `head`: calibrated on the other half, which the exit rests on.
    Without a suffix: as it is stated with a token, which reads the logits too.
    """
    raw, told = survey.evaluation.logit.sigmoid(), survey.reported_confidence(settings)
    signals = survey.signals(settings)
    head, sharp = signals["confidence"], signals["maxprob"]
    place = rule_depths(survey, settings)[None] - 1

    def at_exit(values: Tensor) -> Tensor:
        return values.gather(0, place)[0]

    hit, loss = at_exit(survey.hit), at_exit(survey.loss)
    by_loop = [
        {
            f"{name}{of}": measure(values[i], target[i])
            for name, measure, target in (
                ("ece", metrics.calibration_error, survey.hit),
                ("auroc", metrics.auroc, survey.hit),
                ("spearman_loss", metrics.spearman, survey.loss),
            )
            for of, values in (("", told), ("_head", head), ("_maxprob", sharp), ("_before", raw))
        }
        for i in range(survey.loops)
    ]
    gains = survey.loss[:-1] - survey.loss[1:]
    return {
        "ece": metrics.calibration_error(at_exit(told), hit),
        "ece_head": metrics.calibration_error(at_exit(head), hit),
        "ece_before": metrics.calibration_error(at_exit(raw), hit),
        "auroc": metrics.auroc(at_exit(told), hit),
        "auroc_head": metrics.auroc(at_exit(head), hit),
        "auroc_maxprob": metrics.auroc(at_exit(sharp), hit),
        "spearman_loss": metrics.spearman(at_exit(told), loss),
        "temperature_before": stored.temperature,
        "temperature": settings.temperature,
        "confidence_offset": settings.confidence_offset,
        "stated": list(settings.stated),
        "reliability_before": [b._asdict() for b in metrics.reliability(at_exit(raw), hit)],
        "reliability": [b._asdict() for b in metrics.reliability(at_exit(told), hit)],
        "confidence_by_loop": by_loop,
        "spearman_gain_by_loop": [
            metrics.spearman(predicted, gain)
            for predicted, gain in zip(survey.evaluation.gain, gains)
        ],
    }


def _chosen(
    shown: Survey,
    settings: ExitSettings,
    choice: Point | None,
    increase: float,
    config: Any,
    context: float,
) -> Document:
    """The rule that was picked on the calibrating half, and what it does on the other."""
    full = _mean(shown.loss[-1])
    points = frontier(shown, settings, config, context)
    fixed = cheapest_fixed(points, full, increase)
    oracle = min(
        (p for p in points if p.rule == "oracle" and p.loss <= full * (1 + increase)),
        key=lambda p: p.mean_loops,
        default=None,
    )
    found: Document = {
        "target_loss_increase": increase,
        "full_depth_loss": full,
        "fixed": asdict(fixed),
        "oracle": oracle and asdict(oracle),
        "rule": None,
    }
    if choice is None:
        return found
    own = choice.settings(settings)
    place = rule_depths(shown, own)[None] - 1
    loss = _mean(shown.loss.gather(0, place))
    return found | {
        "rule": choice.rule,
        "threshold": choice.threshold,
        "confidence": choice.confidence,
        "mean_loops": _mean(place + 1),
        "loss": loss,
        "loss_increase": loss / full - 1,
        "flops": choice.flops,
    }


def _tasks(
    loaded: LoadedModel, data: Path, shards: Shards, settings: ExitSettings, loops: int
) -> list[Document]:
    """Lines that need depth, where the data has them: accuracy by loop, and the loops they take."""
    found = []
    for name, tokens, counted in probe_batches(read_probes(data), shards.tokenizer):
        survey = survey_lines(loaded.model, tokens, loops, counted)
        place = rule_depths(survey, settings)[None] - 1
        found.append(
            {
                "name": name,
                "accuracy_by_loop": survey.evaluation.accuracy_by_loop,
                "accuracy": _mean(survey.hit.gather(0, place)),
                "mean_loops": _mean(place + 1),
            }
        )
    return found


def _policies(
    loaded: LoadedModel, shards: Shards, settings: ExitSettings, tokens: int, fixed: int
) -> list[Document]:
    """Cache policies in real decoding of held-out texts, batch 1, with exits and at fixed depths.

    `loss_with_full_cache`, `accuracy_with_full_cache`: of the same texts at the same depths, had
    every token run all loops.
    `fixed`: the depth; None with exits. Among the depths is the next one below what the exit takes.
    """
    model, deepest = loaded.model, loaded.model.config.max_loops
    engine = Engine(model, loaded.tokenizer, settings)
    texts = _pieces(shards, tokens, min(_DECODED_TEXT, model.config.max_seq_len))
    if not texts:
        return []
    seen = [evaluate_loops(model, text[None], deepest) for text in texts]

    def decode(policy: str, depth: int | None) -> Document:
        options = GenerationOptions(loops=depth or "auto", prompt_loops=deepest, kv_policy=policy)
        engine.score_forced(texts[0][None], _PROMPT, options)  # graphs are recorded at first use
        walked = [engine.score_forced(text[None], _PROMPT, options) for text in texts]
        losses, hits = (torch.cat([part[0] for part in w]) for w in zip(*(w[:2] for w in walked)))

        def exact(by_loop: Sequence[Tensor]) -> float:
            parts = (values[:, _PROMPT - 1 :].gather(0, w.loops - 1)
                     for values, w in zip(by_loop, walked))  # fmt: skip
            return _mean(torch.cat([part[0] for part in parts]))

        return {
            "policy": policy,
            "exit": settings.rule if depth is None else f"fixed at {depth}",
            "fixed": depth,
            "prompt_loops": deepest,
            "tokens": len(losses),
            "loss": _mean(losses),
            "loss_with_full_cache": exact([part.each for part in seen]),
            "accuracy": _mean(hits),
            "accuracy_with_full_cache": exact([part.hit for part in seen]),
            "mean_loops": _mean(torch.cat([w.loops[0, 1:] for w in walked])),
            "bytes_per_token": walked[0].bytes_per_token,
            "tokens_per_second": len(losses) / sum(w.seconds for w in walked),
        }

    found = []
    for policy in POLICIES:
        own = decode(policy, None)
        depths = sorted({_below(own), fixed, deepest})
        found += [own, *(decode(policy, depth) for depth in depths)]
    return found


def _below(own: Document) -> int:
    """The fixed depth that costs what an exit in real decoding does, at most `_NEXT` more."""
    return max(1, int(own["mean_loops"] + _NEXT))


def _policy(found: list[Document]) -> str:
    """The cache policy to keep: the smaller `last` unless `fill` is clearly better with exits."""
    losses = {each["policy"]: each["loss"] for each in found if each["fixed"] is None}
    return "last" if losses["last"] <= losses["fill"] * (1 + _LEVEL) else "fill"


def _as_good(found: list[Document], policy: str, tasks: list[Document]) -> Document | None:
    """What shows that the exit is not worth having, with this cache: a fixed depth at about
    the same cost or less that predicts texts as well, and answers as many lines; None where there
    is none.
    """
    rows = {each["fixed"]: each for each in found if each["policy"] == policy}
    own, simple = rows[None], rows[_below(rows[None])]
    answers = all(
        task["accuracy"] <= task["accuracy_by_loop"][simple["fixed"] - 1] + _POINTS
        for task in tasks
    )
    return simple if answers and simple["loss"] <= own["loss"] * (1 + _LEVEL) else None


def _pieces(shards: Shards, wanted: int, length: int) -> list[Tensor]:
    """Pieces of held-out documents, spread over the split, with about so many tokens after their
    prompts; each (length,) or, where a document ends, shorter."""
    if length <= _PROMPT + 1:
        return []
    end = end_id(shards.tokenizer)
    tokens = shards.tokens("val")
    stream = torch.from_numpy(tokens.read(0, len(tokens)))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (stream == end).nonzero()[:, 0] + 1])
    found: dict[int, Tensor] = {}
    places = torch.linspace(0, len(stream) - 1, max(4, 4 * wanted // (length - _PROMPT)))
    for place in places.long().tolist():
        document = int(torch.searchsorted(starts, place, right=True)) - 1
        begin = int(starts[document])
        begin += (place - begin) // length * length
        stop = int(starts[document + 1]) if document + 1 < len(starts) else len(stream)
        text = stream[begin : min(begin + length, stop)]
        if len(text) > _PROMPT + 1:  # the first of them is the prompt's
            found.setdefault(begin, text)
    there = sum(len(text) - _PROMPT for text in found.values())
    return list(found.values())[:: max(1, math.ceil(there / wanted))]


def _text(loaded: LoadedModel, settings: ExitSettings, config: InspectConfig) -> list[int]:
    """The tokens to trace, a prompt with its greedy continuation."""
    text = config.text if config.text is not None else config.prompt
    assert text is not None
    ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    tokens = [*opening_ids(loaded.tokenizer), *ids]
    if config.prompt is not None:
        options = GenerationOptions(temperature=0, max_new_tokens=config.max_new_tokens)
        engine = Engine(loaded.model, loaded.tokenizer, settings, ends=loaded.special.ends)
        tokens = tokens + [step.id for step in engine.generate([tokens], options)]
    if len(tokens) < 2:
        raise UsageError("--text: has fewer than two tokens; give a longer one")
    return tokens[: loaded.model.config.max_seq_len]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
