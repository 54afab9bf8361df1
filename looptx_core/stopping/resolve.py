"""A request's `Exit`: its options, and the model's stored settings where these are unset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from looptx_core.config.generation import EXIT_RULES, ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.ranges import check_ranges
from looptx_core.errors import UsageError
from looptx_core.model.layer_state import POLICIES
from looptx_core.model.rounding import KINDS
from looptx_core.stopping.rule import RULES, Exit, fixed_exit


def resolve_exit(settings: ExitSettings, options: GenerationOptions, config: ModelConfig) -> Exit:
    """A request's exit: its options, and the model's own settings where an option is unset.

    Raises `UsageError` for unknown names, depths in the wrong order, and numbers out of range.
    """
    check_ranges(options)
    rule = options.exit or settings.rule
    policy = options.kv_policy or settings.kv_policy
    kind = options.kv_type or settings.kv_type
    if rule not in RULES:
        raise UsageError(f"`exit` {rule}: not one of {', '.join(EXIT_RULES)}")
    if policy not in POLICIES:
        raise UsageError(f"`kv_policy` {policy}: not one of {', '.join(POLICIES)}")
    if kind not in KINDS:
        raise UsageError(f"`kv_type` {kind}: not one of {', '.join(KINDS)}")
    settings = replace(settings, rule=rule, kv_policy=policy, kv_type=kind)
    if options.threshold is not None:
        threshold: dict[str, Any] = {"confidence" if rule == "auto" else rule: options.threshold}
        settings = replace(settings, **threshold)
    if options.speculate:
        return _full_depth(settings, options, config)
    if options.loops != "auto":
        return fixed_exit(options.loops, settings)
    deepest = config.max_loops if options.max_loops is None else options.max_loops
    least = min(settings.min_loops, deepest) if options.min_loops is None else options.min_loops
    if not 1 <= least <= deepest:
        raise UsageError(
            f"`min_loops` {least} `max_loops` {deepest}: need 1 <= `min_loops` <= `max_loops`"
        )
    return Exit(least, deepest, settings, rule)


def draft_loops(options: GenerationOptions, full: Exit) -> int:
    """Loops of a draft: as the options say, by default the fewest that training read out."""
    if options.draft_loops is None:
        return max(1, min(full.settings.min_loops, full.max_loops - 1))
    return options.draft_loops


def _full_depth(settings: ExitSettings, options: GenerationOptions, config: ModelConfig) -> Exit:
    """The exit of speculation, whose full depth is `options.loops` or else the deepest allowed."""
    full = options.loops
    if full == "auto":
        full = config.max_loops if options.max_loops is None else options.max_loops
    verified = fixed_exit(full, settings)
    shallow = draft_loops(options, verified)
    if not 1 <= shallow < full:
        raise UsageError(
            f"`draft_loops` {shallow}: drafts of 1 to {full - 1} loops go with a depth of {full}"
        )
    if options.kv_policy not in (None, "fill"):
        raise UsageError(
            f"`speculate` with `kv_policy` {options.kv_policy}: drafts would overwrite what "
            "full depth needs; add `kv_policy` fill"
        )
    return replace(verified, settings=replace(settings, kv_policy="fill"))
