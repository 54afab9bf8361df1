"""What docs/benchmarks.md says about p-hop."""

from benchmarks.common.tables import mean, newest, percent, pick, source, table


def section() -> str:
    small, paper = newest("p_hop.run"), newest("p_hop.run", "paper-shape")

    def accuracy(rows: list[dict], hops: int) -> str:
        return ", ".join(percent(row["accuracy_by_hops_and_loop"][-1][hops - 1], 1) for row in rows)

    lines = []
    for name, steps in (("1 x 1", 3000), ("1 x 6", 2000), ("1 x 6", 3000), ("6 x 1", 2000)):
        rows = pick(small["rows"], name=name, steps=steps)
        parameters, flops = rows[0]["parameters"], mean(rows, "flops")
        lines.append([name, f"{steps:,}", f"{parameters / 1e3:.0f}k", f"{flops:.2g}",
                      accuracy(rows, 1), accuracy(rows, 4)])  # fmt: skip
    large = []
    for name in ("1 x 1", "1 x 6", "2 x 1", "2 x 3", "3 x 1", "3 x 2", "6 x 1"):
        rows = pick(paper["rows"], name=name)
        size = f"{rows[0]['parameters'] / 1e6:.2f}M"
        large.append([name, size, *(accuracy(rows, p) for p in (1, 8, 16))])
    return f"""\
## Does looping help where a task needs depth?

Yes. On p-hop induction one block that is looped six times answers as well as six different layers,
with a sixth of their parameters. Columns are the number of hops; values are accuracies at full
depth, one for each seed.

{table(["layers x loops", "steps", "parameters", "FLOPs", "1 hop", "4 hops"], lines)}

At 2,000 steps one of two looped runs is still behind. The paper's task (Saunshi et al., arXiv
2502.17416: 256 symbols, up to 16 hops), 2,000 steps where the paper takes 200,000:

{table(["layers x loops", "parameters", "1 hop", "8 hops", "16 hops"], large)}

{source(small, paper)}"""
