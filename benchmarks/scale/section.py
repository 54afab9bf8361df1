"""What docs/benchmarks.md says about memory and several processes."""

from benchmarks.common.tables import newest, source, table


def section() -> str:
    plan, sent = newest("scale.memory_plan"), newest("scale.zero_communication")
    lines = [
        [row["case"], f"{row['parameters'] / 1e6:.0f}M", f"{row['planned'] / 1e9:.2f}",
         f"{row['measured'] / 1e9:.2f}", f"{row['ratio']:.2f}"]
        for row in plan["rows"]
    ]  # fmt: skip
    ratios = [row["ratio"] for row in plan["rows"]]
    traffic = [
        [row["loop_schedule"], f"{row['loops'][-1]:.1f}",
         "yes" if row.get("grad_checkpointing") else "no", "yes" if row["held"] else "no",
         f"{row['gathered'][-1]:.2f}", f"{row['reduced'][-1]:.2f}"]
        for row in sent["rows"]
    ]  # fmt: skip
    return f"""\
## Is `looptx train --dry-run` right about memory?

Planned memory is {min(ratios):.2f} to {max(ratios):.2f} times the measured peak, float32 on a CPU.
GPUs, bf16 and several processes have not been measured, and the plan of some cases was fitted to
them ([memory](explanation/memory.md)).

{table(["case", "parameters", "planned, GB", "measured, GB", "ratio"], lines)}

{source(plan)}

## What does ZeRO-3 send where weights are looped?

looptx holds the looped weights from the first loop to the optimizer's step, so that the traffic
does not grow with the loops. Multiples of the weights' size in a step, two processes on one
machine; several machines were not measured.

{table(["schedule", "loops", "recomputed", "held", "gathered", "reduced"], traffic)}

{source(sent)}"""
