"""What looptx's claims rest on: a folder for each question, run from the repository's root.

`python -m benchmarks.decode_speed.run` measures, `python -m benchmarks.page` writes
docs/benchmarks.md from the newest records.
"""
