"""What docs/benchmarks.md says about finetuning."""

from benchmarks.common.tables import mean, newest, percent, pick, source, table


def section() -> str:
    record = newest("finetuning.run")
    runs = pick(record["rows"], part="runs")
    lines = []
    for method in ("full-180", "lora-180", "qlora-180", "lora-420", "qlora-420"):
        rows = pick(runs, method=method)
        kind, steps = method.split("-")
        lines.append([
            kind, steps, f"{rows[0]['lr']:g}", ", ".join(percent(r["solved"], 1) for r in rows),
            percent(rows[0]["trainable_share"], 1), f"{mean(rows, 'own_loss'):.2f}",
            f"{mean(rows, 'ece'):.3f}",
        ])  # fmt: skip
    heads = ["method", "steps", "learning rate", "solved, by seed", "trained weights",
             "loss on the base's own text", "calibration error"]  # fmt: skip
    return f"""\
## Do LoRA and QLoRA learn as much as full finetuning?

With more than twice the steps, within two points; in as many steps they are behind. All methods
forget the base's own text (its loss was {record["settings"]["base.own_loss"]:.2f}), full
finetuning most. A task of reasoning-gym (`{record["settings"]["task"]}`), a base of 0.6M
parameters that solves none of it.

{table(heads, lines)}

{source(record)}"""
