"""What docs/benchmarks.md says about self-speculation."""

from benchmarks.common.tables import newest, one, percent, source, table


def section() -> str:
    trained, bundled = (
        newest("speculation.run", "trained native"),
        newest("speculation.run", "bundled native"),
    )
    lines = []
    for side in dict.fromkeys(row["side"] for row in trained["rows"]):
        greedy, drawn = (one(trained["rows"], side=side, temperature=t) for t in (0.0, 0.8))
        own = [row for row in bundled["rows"] if row["side"] == side and row["temperature"] == 0.0]
        accepted = percent(greedy["accepted"]) if greedy["accepted"] else ""
        lines.append([side, accepted, f"{greedy['ratio']:.2f}", f"{drawn['ratio']:.2f}",
                      f"{own[0]['ratio']:.2f}" if own else ""])  # fmt: skip
    heads = ["drafts", "accepted", "width 512, greedy", "temperature 0.8", "bundled model, greedy"]
    return f"""\
## Does self-speculation pay?

Yes where a loop costs much: shallow loops draft and full depth verifies in one pass. Ratios of
tokens a second to full depth, batch 1, ten loops (aim 1.5). The bundled model, whose loop is a
fiftieth of a token's time, gains next to nothing: a run whose record was not kept had 0.84 to
0.90.

{table(heads, lines)}

{source(trained, bundled)}"""
