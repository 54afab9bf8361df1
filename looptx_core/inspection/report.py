"""An inspection from a model and its data to one JSON document, which all figures are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from looptx_core.atomic import write_folder
from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings
from looptx_core.config.inspection import InspectConfig
from looptx_core.data.batches import held_out, text_windows
from looptx_core.data.probes import probe_batches, read_probes
from looptx_core.data.shards import Shards
from looptx_core.errors import UsageError
from looptx_core.inspection.decoding import as_good, better_policy, decode_policies, mean
from looptx_core.inspection.frontier import (
    Point,
    cheapest_fixed,
    choose,
    frontier,
    rule_depths,
    standard_error,
    undecided,
)
from looptx_core.inspection.measure import measure_records, measure_text
from looptx_core.inspection.media import inspect_media
from looptx_core.inspection.memory import inspect_memory
from looptx_core.inspection.survey import Survey, survey_lines
from looptx_core.inspection.texts import asked_text, sample
from looptx_core.inspection.trace import trace_text
from looptx_core.inspection.written import inspect_written
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.media.registry import MEDIA, writers
from looptx_core.stopping.rule import Exit
from looptx_core.training import metrics
from looptx_core.training.calibration import calibrate

if TYPE_CHECKING:  # looking at text needs no trainer
    from looptx_core.data.datamodule import Batches

SCHEMA_VERSION = 1
_OF_TRAINING = ("base", "method", "data", "steps", "tokens")
SHOWN_INCREASE = 0.005
"""The rise of the loss at which rules are compared where none is asked for."""
_MEMORY_TEXTS = 8  # sequences to read with a memory and without
Document = dict[str, Any]


@freed_memory_kept()
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
            f"`seq_len` {config.seq_len}: the model's context holds {model.config.max_seq_len}"
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
    choice = choose(to_choose, mean(fit.loss[-1]), increase)
    open_ = undecided(to_choose, choice, mean(fit.loss[-1]), increase, fit.evaluation.tokens)
    if choice is not None and config.allowed_increase is not None:
        settings = choice.settings(settings)
    if isinstance(data, Path) and shards is not None:
        tasks = _tasks(loaded, data, shards, settings, loops)
    document: Document = {
        "schema_version": SCHEMA_VERSION,
        "model": str(loaded.folder),
        "facts": _facts(loaded),
        "data": name or str(data),
        "tokens": shown.evaluation.tokens,
        "tokens_to_calibrate": fit.evaluation.tokens,
        "loops": loops,
        **_by_loop(shown, tokens_per_byte),
        **_confidence(shown, stored, settings),
        "frontier": [asdict(point) for point in frontier(shown, settings, model.config, context)],
        "choice": {
            **_chosen(shown, settings, choice, increase, model.config, context),
            "undecided": open_ and {**asdict(open_[0]), "tokens": open_[1]},
        },
        "exit": Exit(min(settings.min_loops, loops), loops, settings, settings.rule).describe(),
        "tasks": tasks,
        "kv_policies": [],
        "as_good": None,
        "memory": None,
        "trace": None,
        "sample": None,
        "written": [],
        **{medium.plural: [] for medium in MEDIA.values()},
    }
    if model.config.has_memory and isinstance(data, Path) and shards is not None:
        report("reading with the memory and without it")
        length = max(config.seq_len, 8 * model.config.memory_block)
        _, val = text_windows(data, shards, length, document_mask=False)
        texts = (batch["tokens"] for batch in held_out(val, _MEMORY_TEXTS, _MEMORY_TEXTS // 2))
        document["memory"] = inspect_memory(model, texts, loops)
    if config.decode_tokens and shards is not None:
        report("decoding with real exits, for each cache policy")
        document["kv_policies"] = decode_policies(
            loaded,
            shards,
            settings,
            config.decode_tokens,
            fixed=int(document["choice"]["fixed"]["mean_loops"]),
        )
    if found := document["kv_policies"]:
        if choice is not None and config.allowed_increase is not None:
            settings = replace(settings, kv_policy=better_policy(found))
        document["as_good"] = as_good(found, settings.kv_policy, document["tasks"])
    asked = config.text is not None or config.prompt is not None
    if asked:
        tokens = asked_text(loaded, settings, config)
    else:
        tokens = [] if shards is None else sample(loaded, shards)
    if tokens:
        report("tracing a text" if asked else "tracing a held-out text")
        document["trace" if asked else "sample"] = trace_text(
            model, loaded.tokenizer, tokens, settings, loops, config.seed
        )
    names = list(writers(model.config))
    if names and config.prompt is not None and config.prompt.strip():
        report("writing the prompt as " + ", ".join(f"a {MEDIA[name].noun}" for name in names))
        document["written"] = inspect_written(
            loaded, config.prompt, settings, loops, config.seed, report
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


def _facts(loaded: LoadedModel) -> Document:
    """What a reader should know of the model, from its folder."""
    config, facts = loaded.config, loaded.facts
    return {
        "name": loaded.name,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "prelude_layers": config.prelude_layers,
        "core_layers": config.core_layers,
        "coda_layers": config.coda_layers,
        "max_loops": config.max_loops,
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_seq_len,
        **{key: facts[key] for key in _OF_TRAINING if key in facts},
    }


def _by_loop(survey: Survey, tokens_per_byte: float) -> Document:
    loss, hit = survey.loss.double(), survey.hit.bool()
    before, after = hit[:-1], hit[1:]
    kl, change = (
        part[1:].double().mean(1).tolist()
        for part in (survey.logit_signals["kl"], survey.evaluation.change)
    )
    return {
        "loss_by_loop": loss.mean(1).tolist(),
        "bits_per_byte_by_loop": (loss.mean(1) / math.log(2) * tokens_per_byte).tolist(),
        "accuracy_by_loop": hit.double().mean(1).tolist(),
        # From the second loop on: answers that the loop corrects, and that it breaks.
        "fixed_by_loop": (~before & after).double().mean(1).tolist(),
        "broken_by_loop": (before & ~after).double().mean(1).tolist(),
        "kl_by_loop": kl,
        "state_change_by_loop": change,
        "state_norm_by_loop": survey.evaluation.norm_by_loop,
    }


def _confidence(survey: Survey, stored: ExitSettings, settings: ExitSettings) -> Document:
    """Calibration and discrimination of the confidence where tokens stop, and after each loop.

    Keys without a suffix are of the confidence that is reported with a token. `before`: the head's
    own output. `head`: its output calibrated on the other half, as exits use it. `maxprob`: the top
    token's probability.
    """
    raw, reported = survey.evaluation.logit.sigmoid(), survey.reported_confidence(settings)
    signals = survey.signals(settings)
    head, maxprob = signals["confidence"], signals["maxprob"]
    exit_index = rule_depths(survey, settings)[None] - 1

    def at_exit(values: Tensor) -> Tensor:
        return values.gather(0, exit_index)[0]

    variants = (("", reported), ("_head", head), ("_maxprob", maxprob), ("_before", raw))

    hit, loss = at_exit(survey.hit), at_exit(survey.loss)
    by_loop = [
        {
            f"{name}{suffix}": measure(values[i], target[i])
            for name, measure, target in (
                ("ece", metrics.calibration_error, survey.hit),
                ("auroc", metrics.auroc, survey.hit),
                ("spearman_loss", metrics.spearman, survey.loss),
            )
            for suffix, values in variants
        }
        for i in range(survey.loops)
    ]
    gains = survey.loss[:-1] - survey.loss[1:]
    return {
        "ece": metrics.calibration_error(at_exit(reported), hit),
        "ece_head": metrics.calibration_error(at_exit(head), hit),
        "ece_before": metrics.calibration_error(at_exit(raw), hit),
        "auroc": metrics.auroc(at_exit(reported), hit),
        "auroc_head": metrics.auroc(at_exit(head), hit),
        "auroc_maxprob": metrics.auroc(at_exit(maxprob), hit),
        "spearman_loss": metrics.spearman(at_exit(reported), loss),
        "temperature_before": stored.temperature,
        "temperature": settings.temperature,
        "confidence_offset": settings.confidence_offset,
        "stated": list(settings.stated),
        "reliability_before": [b._asdict() for b in metrics.reliability(at_exit(raw), hit)],
        "reliability": [b._asdict() for b in metrics.reliability(at_exit(reported), hit)],
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
    full = mean(shown.loss[-1])
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
    losses = shown.loss.gather(0, place)[0]
    loss = mean(losses)
    return found | {
        "rule": choice.rule,
        "threshold": choice.threshold,
        "confidence": choice.confidence,
        "mean_loops": mean(place + 1),
        "loss": loss,
        "loss_increase": loss / full - 1,
        "loss_increase_error": standard_error(losses.double() - shown.loss[-1]) / full,
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
                "accuracy": mean(survey.hit.gather(0, place)),
                "mean_loops": mean(place + 1),
            }
        )
    return found
