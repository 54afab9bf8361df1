"""What docs/benchmarks.md says about ternary weights."""

from benchmarks.common.tables import newest, pick, source, table


def section() -> str:
    record = newest("ternary.run")
    conversions = [
        [row["name"], f"{row['bytes_after']:,}", f"{row['bits_per_weight']:.2f}",
         f"{row['loss_by_loop'][0]:.3f}", f"{row['loss_after']:.3f}",
         f"{100 * (row['loss_after'] / row['loss_before'] - 1):+.1f} %"]
        for row in pick(record["rows"], part="conversions")
    ]  # fmt: skip
    errors = [
        [row["name"], *(f"{row['relative_state_error'][loop - 1]:.3f}" for loop in (1, 2, 4, 10)),
         *(f"{row['kl_nats'][loop - 1]:.3f}" for loop in (1, 10))]
        for row in pick(record["rows"], part="compounding")
    ]  # fmt: skip
    (speed,) = pick(record["rows"], part="speed")
    packed, exact = (speed[f"decode_tokens_per_second.{k}"] for k in ("packed", "float32"))
    return f"""\
## What do ternary weights cost and bring?

The bundled model (0.5M parameters) converted: rounding alone ruins it, 200 steps of training bring
it near.

{
        table(
            ["", "bytes of the folder", "bits a weight", "loss, 1 loop", "10 loops", "change"],
            conversions,
        )
    }

`small` decodes {speed["median_ratio"]:.1f} times as fast as in float32 ({packed:.0f} against
{exact:.0f} tokens a second, one thread).

The error of rounding does not grow over loops where the injection decays the state; without an
injection it does. Relative error of the state by loop, and nats of KL from the unrounded model:

{table(["", "1", "2", "4", "10", "KL, 1 loop", "KL, 10"], errors)}

{source(record)}"""
