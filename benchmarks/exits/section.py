"""What docs/benchmarks.md says about early exits."""

from benchmarks.common.record import Record
from benchmarks.common.tables import newest, one, percent, pick, source, table


def _quality(record: Record) -> list[str]:
    rows = record["rows"]

    def each(column: str, form: str) -> str:
        return ", ".join(format(row[column], form) for row in rows)

    def shares(column: str) -> str:
        return ", ".join(percent(row[column], 2) for row in rows)

    share = record["settings"]["share_of_d*.mean"]
    return [each("d*", ".0f"), each("mean_loops", ".2f"), f"{share:.2f}", shares("loss_increase"),
            shares("depth_brings"), shares("free_ahead_by_at_most"), each("ece_head", ".3f"),
            each("auroc_head", ".3f"), each("auroc_maxprob", ".3f")]  # fmt: skip


def section() -> str:
    models = {
        "the default run: *Moby Dick* and lines": newest("exits.run"),
        "speeches, width 64": newest("exits.run", "speeches-narrow"),
        "speeches, width 256": newest("exits.run", "speeches-wide"),
    }
    named = ["smallest equal fixed depth", "mean loops of the exit", "their ratio (aim 0.75)",
             "loss above full depth (aim 0.5 %)", "what depth brings over one loop",
             "the best training-free rule is ahead by", "ECE of the head (aim 0.02)",
             "AUROC of the head", "AUROC of the largest probability"]  # fmt: skip
    columns = zip(*map(_quality, models.values()))
    quality = [[name, *values] for name, values in zip(named, columns)]
    timed = [newest("exits.clock", f"speeches-{seed}") for seed in range(3)]
    bundled = newest("exits.clock")
    decoded = [(f"speeches, width 256, seed {seed}", row) for seed, record in enumerate(timed)
               for row in pick(record["rows"], part="decoding")]  # fmt: skip
    above = [row["exit.nats"] / row["full depth.nats"] - 1 for _, row in decoded]
    decoded += [
        (f"bundled model, {text}", one(bundled["rows"], part="decoding", text=text, rule="gain"))
        for text in ("prose", "hop lines", "both")
    ]
    clock = [
        [name, f"`{row['rule']}`", f"{row['exit.mean_loops']:.2f}",
         *(f"{row[f'{side}.nats']:.3f}" for side in ("exit", "fixed", "full depth")),
         f"{row['exit_against_fixed']:.2f}", f"{row['exit_against_full_depth']:.2f}"]
        for name, row in decoded
    ]  # fmt: skip
    priced = [newest("exits.clock", "prices-nano"), newest("exits.clock", "prices-speeches")]
    prices = []
    for name, record in zip(("`nano`", "speeches, width 256"), priced):
        row = one(record["rows"], part="prices", model="bundled")
        by_rule = (row[f"decision_within_a_ride_by_rule_in_loops.{r}"] for r in ("gain", "auto"))
        prices.append([name, f"{row['loop_ms']:.3f}", *(percent(p, 1) for p in by_rule)])
    targets = newest("exits.confidence_targets")
    learnt = [
        [row["target"], f"{row['auroc'][0]:.3f}", f"{row['ece'][0]:.3f}",
         *(f"{row[f'gain, {loops} loops'][0]:+.2f} %" for loops in (1.25, 1.5, 2.0))]
        for row in pick(targets["rows"], task="text")
    ]  # fmt: skip
    calibration, gain = newest("exits.calibration"), newest("exits.gain")
    shown = [
        [row["depth"], f"{row['mean_loops']:.2f}", f"{row['loss']:.4f}"]
        for row in calibration["rows"] if row.get("loss")
    ]  # fmt: skip
    at = ("1.5", "2.0", "2.2", "2.4")
    forecasts = []
    for name in dict.fromkeys(row["calibration"] for row in gain["rows"]):
        rows = pick(gain["rows"], calibration=name)
        forecasts.append([name, *(", ".join(f"{row[loops]:.2f}" for row in rows) for loops in at)])
    return f"""\
## Does an early exit keep the quality?

Yes, within half a per cent of the loss, and with fewer loops than any fixed depth that does the
same. One value for each of three trained seeds; rules are picked on one half of the held-out text
and measured on the other.

{table(["", *models], quality)}

The head that decides tells right from wrong less well than the largest probability, which needs a
pass over the vocabulary. At width 64 a rule that needs no training, the change of the state, is
ahead at equal FLOPs.

{source(*models.values())}

## Is an early exit faster on the clock?

By a sixth to a fifth where a loop is large enough (speeches, width 256); on these few texts its
loss is {percent(min(above), 1)} to {percent(max(above), 1)} above full depth's, where 0.5 % was
asked for. On prose the bundled model's one loop is as good as ten, so that no exit can beat that
fixed depth. Real decoding, batch 1; the last columns are ratios of tokens a second to the smallest
fixed depth of equal loss, and to full depth.

{
        table(
            [
                "model",
                "rule",
                "mean loops",
                "loss of the exit",
                "of the fixed depth",
                "of full depth",
                "against the fixed depth",
                "against full depth",
            ],
            clock,
        )
    }

What a decision costs, as a share of one loop (aim 3 %): `auto`, which asks after every loop how
sure the token is as well, misses it.

{table(["model", "a loop, ms", "by `gain`", "by `auto`"], prices)}

{source(*timed, bundled, *priced)}

## What should the confidence head learn, and how is its forecast calibrated?

New heads on one frozen trunk: no target is better than the default by more than the seeds differ.
The last columns are the loss above full depth at a mean of so many loops.

{table(["target, on text", "AUROC", "ECE", "1.25 loops", "1.5", "2"], learnt)}

Calibrating the forecast saves loops at the same threshold (the bundled model):

{table(["", "mean loops", "nats a token"], shown)}

Per cent of the loss that each calibration loses at a mean of so many loops, by seed (speeches,
width 64):

{table(["calibration", *at], forecasts)}

{source(targets, calibration, gain)}"""
