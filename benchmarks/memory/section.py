"""What docs/benchmarks.md says about memories."""

from benchmarks.common.record import Record
from benchmarks.common.tables import mean, percent, pick, records, source, table

PLACES = ("start", "middle", "end", "four")


def section() -> str:
    makers = (("memory.run", "", _passkeys), ("memory.run", "prose", _prose),
              ("memory.hops", "", _hops), ("memory.stream", "", _stream),
              ("memory.reading", "", _reading), ("memory.decoding", "", _decoding))  # fmt: skip
    found = [
        (record, say) for name, variant, say in makers for record in records(name, variant)[:1]
    ]
    parts = [say(record) for record, say in found]
    return "\n\n".join([
        "## Does a memory keep what left the window?", *parts,
        source(*(record for record, _ in found)),
    ])  # fmt: skip


def _keys(record: Record) -> str:
    """Digits found by kind, length and place, a mean over seeds."""
    rows = record["rows"]
    lines = []
    for kind, filler in dict.fromkeys((row["kind"], row["filler"]) for row in rows):
        own = pick(rows, kind=kind, filler=filler)
        shares = [percent(mean(pick(own, place=place), "accuracy"), 1) for place in PLACES]
        rate = f"{mean(own, 'tokens_per_cpu_second') / 1e3:.0f}k"
        texts, state = own[0]["texts"], f"{own[0]['state_bytes'] / 1e3:.0f} kB"
        lines.append([kind, f"{filler:,}", texts, *shares, rate, state])
    heads = ["memory", "filler", "texts", *PLACES[:3], "one of four", "tokens a CPU second",
             "state"]  # fmt: skip
    return table(heads, lines)


def _passkeys(record: Record) -> str:
    settings = record["settings"]
    return f"""\
Passkeys of five digits, told once in a filler of one sentence that comes again and again, and asked
at the end. The models learned this at {settings["length"]} tokens in {settings["steps"]} steps.
Digits that are right, by where the key stands (a guess is right in a tenth of the cases):

{_keys(record)}"""


def _prose(record: Record) -> str:
    return f"""\
The same in prose, of which the last fifth was held out:

{_keys(record)}"""


def _hops(record: Record) -> str:
    lines = []
    kinds = dict.fromkeys((row["kind"], row["loops"]) for row in record["rows"])
    for kind, loops in kinds:
        own = pick(record["rows"], kind=kind, loops=loops)
        for loop in range(loops):
            by_seed = [row["accuracy_by_loop_and_hops"][loop] for row in own]
            shares = [", ".join(percent(seed[hops]) for seed in by_seed)
                      for hops in range(len(by_seed[0]))]  # fmt: skip
            lines.append([kind, loops, loop + 1, *shares])
    heads = ["memory", "trained loops", "after loop", "1 hop", "2 hops", "3 hops", "4 hops"]
    guess = percent(1 / record["settings"]["symbols"])
    return f"""\
**Hops over a memory.** A ring of {record["settings"]["symbols"]} arrows comes first, then
{record["settings"]["between"]:,} tokens of held-out prose, then symbols: where do arrows lead from
them? Loop n is taught to answer n hops, and a model of one loop to answer three. How often what is
read out after a loop is where so many arrows lead, by seed (a guess: {guess}):

{table(heads, lines)}"""


def _stream(record: Record) -> str:
    lines = []
    for text, name in dict.fromkeys((row["text"], row["name"]) for row in record["rows"]):
        own = pick(record["rows"], text=text, name=name)
        stream = "" if own[0]["stream"] is None else f"{mean(own, 'stream'):.4f}"
        lines.append([text, name, stream, f"{mean(own, 'in_pieces'):.4f}",
                      f"{own[0]['flops_a_token'] / 1e6:.2f}M",
                      f"{own[0]['state_bytes'] / 1e3:.0f} kB"])  # fmt: skip
    return f"""\
**Long texts.** Loss past the window in nats a token, of held-out text as one stream and in pieces
of 4,096 tokens, a mean over seeds:

{table(["text", "model", "stream", "pieces", "FLOPs a token", "state"], lines)}"""


def _decoding(record: Record) -> str:
    rows, settings = record["rows"], record["settings"]
    lines = []
    for preset, weights in dict.fromkeys((row["preset"], row["weights"]) for row in rows):
        plain, *others = pick(rows, preset=preset, weights=weights)
        rounds = len(plain["microseconds_a_token"])
        rates = [f"{row['tokens_per_cpu_second']:,.0f}" for row in (plain, *others)]
        lines.append([preset, plain["loops"], weights, rounds, *rates,
                      *(f"{row['ratio_of_times']:.2f}" for row in others)])  # fmt: skip
    heads = ["preset", "loops", "weights", "rounds", "without", "delta", "infini",
             "time by delta", "by infini"]  # fmt: skip
    return f"""\
**Decoding** by the CPU kernel, tokens a CPU second, batch 1, beyond a window of
{settings["window"]} tokens and without a memory over as many tokens. The last two columns: the time
of a token as a multiple of that without a memory, a median over rounds (aim: at most 1.10; the
noise of this shared machine is of the same size):

{table(heads, lines)}"""


def _reading(record: Record) -> str:
    lines = [
        [row["kind"], f"{row['tokens']:,}", f"{row['tokens_per_cpu_second']:,}",
         f"{row['peak_bytes'] / 1e6:.0f} MB", f"{row['state_bytes'] / 1e3:.0f} kB",
         "" if row["first_id_changes"] is None else f"{row['first_id_changes']:.2g}"]
        for row in record["rows"]
    ]  # fmt: skip
    heads = ["memory", "tokens", "tokens a CPU second", "peak of the process", "state", "change"]
    return f"""\
**Reading** by the engine, one text at a time. The last column: by how many nats a key's first digit
at the start of the text changes the answer at its end:

{table(heads, lines)}"""
