"""looptx convert: one kind of model folder into another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import note, stdout
from looptx_cli.dry_run import show_conversion
from looptx_cli.imports import large_imports
from looptx_cli.options import with_fields
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.resolve import config_file, resolve
from looptx_core.words import quoted

if TYPE_CHECKING:
    from looptx_core.conversion.run import ConvertResult

SCHEMA_VERSION = 1
_MUCH = 0.1  # a larger rise of the loss, as a share, is a warning


@with_fields(ConvertConfig)
def convert(
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done and written only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
) -> None:
    """Convert a model: into ternary weights, for transformers, ONNX or llama.cpp, or from plain
    ones.

    \b
    looptx convert --to-bitnet
    looptx convert --to-bitnet --model runs/a --finetune-steps 1000 --max-minutes 30
    looptx convert --to-bitnet --direct --out rounded
    looptx convert --dtype int8 --model runs/a --out small
    looptx convert --to-hf --model runs/a --dtype bf16
    looptx convert --to-onnx --model runs/a --loops 4
    looptx convert --to-gguf --model runs/finetune-1 --dtype int8
    looptx convert --from-hf a-hf --out a-again
    looptx convert --from-gguf model-Q4_K_M.gguf --core auto
    looptx convert --adapter runs/finetune-1 --merge-adapter
    looptx convert --memory delta --model runs/a
    """
    settings = resolve(ConvertConfig, flags=flags, config=config).build(ConvertConfig)

    with large_imports():
        from looptx_cli.progress import train_progress
        from looptx_core.conversion.run import convert

    if dry_run:
        from looptx_core.conversion.plan import plan_conversion

        found = plan_conversion(
            settings, overwrite=overwrite, inputs=[config_file(config)],
            report=lambda line: note(line, quiet),
        )  # fmt: skip
        show_conversion(found, as_json)
        return
    result = convert(
        settings,
        overwrite=overwrite,
        inputs=[config_file(config)],
        callbacks=[train_progress(settings.finetune_steps, quiet)],
        report=lambda line: note(line, quiet),
    )
    if settings.to_bitnet and result.rise > _MUCH:
        cure = "leave --direct out" if settings.direct else "give more --finetune-steps, or more "
        cure += "" if settings.direct else "--max-minutes"
        note(f"warning: the held-out loss rose by {result.rise:.0%} on {result.judged_by}; {cure}")
    if as_json:
        typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, **result.to_dict()}))
        return
    _show(result)
    if settings.to_hf:
        note(
            "try next: AutoModelForCausalLM.from_pretrained"
            f"({str(result.out)!r}, trust_remote_code=True) in transformers",
            quiet,
        )
    elif settings.to_onnx:
        note(f"try next: {result.out}/README.md tells how onnxruntime-genai opens it", quiet)
    elif settings.to_gguf:
        file = next(result.out.glob("*.gguf"))
        note(f'try next: llama-cli -m {quoted(file)} -p "Call me" -n 40', quiet)
    elif settings.memory:
        note(f"try next: looptx finetune --model {quoted(result.out)} --seq-len 1024", quiet)
    else:
        out = quoted(result.out)
        note(f'try next: looptx generate "Call me" --model {out} --show-iterations', quiet)


def _show(result: ConvertResult) -> None:
    from rich.table import Table

    out = stdout()

    def say(line: str) -> None:
        out.print(line, soft_wrap=True)

    at_one_depth = result.loops is not None
    if result.loss_by_loop != result.loss_by_loop_before and not at_one_depth:
        say(f"Held-out loss, nats a token, on {result.judged_by}")
        table = Table(box=None, pad_edge=False)
        for name in ("loops", "before", "after"):
            table.add_column(name, justify="right")
        losses = zip(result.loss_by_loop_before, result.loss_by_loop)
        for loop, (before, after) in enumerate(losses, 1):
            table.add_row(str(loop), f"{before:.4f}", f"{after:.4f}")
        out.print(table)

    if result.spans:
        say("what a second loop of these layers costs without training, nats a token:")
        table = Table(box=None, pad_edge=False)
        for name in ("core", "cost"):
            table.add_column(name, justify="right")
        for span in result.spans:
            chosen = " *" if span.name == result.core else ""
            table.add_row(span.name + chosen, f"{span.cost:+.3f}")
        out.print(table)
    if result.core:
        later = {"bridge": "which later loops enter through an untrained bridge",
                 "half_steps": "with a second loop in half steps"}  # fmt: skip
        say(f"core: layers {result.core}, {later[str(result.injection)]}")
    if (halves := result.half_steps) is not None:
        taken = result.injection == "half_steps"
        advice = "; --injection half_steps takes them" if halves.pay and not taken else ""
        if taken and not halves.pay:
            advice = "; they do not pay here, so leave --injection out"
        say(
            f"half steps of the core, untrained: {halves.cost:+.4f} ± {halves.error:.4f} nats a "
            f"token (standard error) on {result.judged_by}{advice}"
        )
    if result.logit_difference is not None:
        gap = f"{result.logit_difference:.1e}"
        say(f"{result.compared}: logits differ by at most {gap} of the largest")
    say(
        f"{result.bytes_before:,} bytes -> {result.bytes_after:,} bytes "
        f"({_change_of_size(result.bytes_before, result.bytes_after)}), "
        f"{result.bits_per_weight:.3f} bits a weight in the blocks; weights in memory "
        f"{result.memory_before:,} -> {result.memory_after:,} bytes"
    )
    # What the model was not made for may get better by chance, or because it forgot its task.
    change = f" ({result.rise:+.1%})" if result.own or result.rise > 0 else ""
    say(
        f"loss on {result.judged_by}: {result.loss_by_loop_before[-1]:.4f} -> "
        f"{result.loss_by_loop[-1]:.4f}{change}, {result.seconds:,.0f} s"
    )
    say(f"model: {result.out}")


def _change_of_size(before: int, after: int) -> str:
    if before == after:
        return "the same size"
    times = max(before, after) / min(before, after)
    return f"{times:.1f} times {'smaller' if after < before else 'larger'}"
