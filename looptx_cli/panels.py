"""The panels of --help: which flag is shown where, for all commands in one place."""

from __future__ import annotations

import copy
from typing import Any

from typer.core import TyperCommand

MOST_USED = "Most used"
OUTPUT = "Output"

_MOST_USED = {
    "train": "data out preset init set steps max_minutes batch_size lr resume",
    "finetune": "model data out lora qlora lora_rank epochs lr batch_size resume",
    "generate": "model adapter image chat max_new_tokens loops exit temperature seed "
    "show_iterations",
    "chat": "model adapter image system max_new_tokens loops exit temperature show_iterations",
    "inspect-loops": "model data out prompt text image audio calibrate target_loss_increase "
    "max_loops",
    "evaluate": "model tasks loops limit out include_path",
    "serve": "model adapter host port api_key max_batch max_context precision",
    "convert": "model out from_gguf from_hf to_bitnet to_hf to_onnx to_gguf dtype adapter",
    "tokenize": "data out vocab_size tokenizer text_key codec set",
    "doctor": "build path",
    "compare": "out format",
    "sweep": "out",
    "push": "private message",
}
"""The flags that matter first, at most ten a command."""

_PANELS = {
    "Data": """
        seq_len batch_size micro_batch workers augment skip_bad document_mask mix mask_patches
        val_fraction val_batches train_on_prompt too_long prompts_file prompt_file data text_key
        columns seed
        audio video fps every timestamps limit include_path tasks codec direction draw speak
    """,
    "Model and depth": """
        model loop_schedule loops min_loops max_loops mean_loops deeper_by loss_threshold
        grow_share deeper_share explore loss_at loss_prior teacher teacher_weight control bitnet
        exit threshold prompt_loops
        draft_loops speculate compare_loops kv_policy kv_type decode_tokens core injection
        memory memory_window memory_block
    """,
    "Adapters": """
        adapter merge_adapter quantization dora lora_per_loop lora_layers lora_alpha lora_dropout
        rslora target_modules
    """,
    "Sampling": """
        max_new_tokens temperature top_k top_p min_p repetition_penalty stop ignore_eos guidance
        draw_steps draw_guidance
    """,
    "Optimiser": """
        steps epochs finetune_steps direct max_minutes lr lr_schedule min_lr warmup lr_decay
        weight_decay
        optimizer beta2 clip
    """,
    "Hardware": """
        precision attention kernel compile grad_checkpointing devices nodes strategy zero3 offload
        nvme_path deepspeed_config
    """,
    "Server": """
        host port api_key max_batch max_queue max_context request_timeout drain_seconds
    """,
    "Checkpoints": """
        save_every keep keep_best val_every eval_every eval_tasks eval_limit shard_size
    """,
    OUTPUT: "config overwrite dry_run force log_every log profile json as_json quiet help",
}
"""The panels below it, in their order, each with its flags by parameter name."""

NAMES = (MOST_USED, *_PANELS)

_PANEL_OF = {flag: panel for panel, flags in _PANELS.items() for flag in flags.split()}


def panel_of(command: str, parameter: str) -> str | None:
    """The panel of a command's flag, by the name of its parameter; None where no panel has it."""
    name = parameter.rstrip("_")
    if name in _MOST_USED.get(command, "").split():
        return MOST_USED
    return _PANEL_OF.get(name)


class PanelledCommand(TyperCommand):
    """A command whose --help shows its flags in panels, the most used first."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if parameter.param_type_name == "option":
                parameter.rich_help_panel = panel_of(str(self.name), parameter.name)
        return sorted(parameters, key=self._order)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As Typer does, with one line on the `--no-` forms, whose column is wider than a screen
        has room for."""
        shown = copy.copy(self)
        shown.params = [copy.copy(parameter) for parameter in self.params]
        if any(parameter.secondary_opts for parameter in shown.params):
            shown.epilog = f"--no-x turns a switch --x off. {self.epilog or ''}".strip()
        for parameter in shown.params:
            parameter.secondary_opts = []
        TyperCommand.format_help(shown, ctx, formatter)

    def _order(self, parameter: Any) -> tuple[int, int]:
        """Arguments, then the panels in order; the most used in the order of their list."""
        panel = getattr(parameter, "rich_help_panel", None)
        if panel == MOST_USED:
            most_used = _MOST_USED[str(self.name)].split()
            return NAMES.index(panel), most_used.index(parameter.name.rstrip("_"))
        return NAMES.index(panel) if panel in NAMES else -1, 0
