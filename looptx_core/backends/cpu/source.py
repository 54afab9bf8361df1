"""What `looptx_core.machine.kernels` builds for decoding; apart, as it must not bring torch."""

from pathlib import Path

# Sums may be taken in any order, as vector units do; -ffast-math would also set how the whole
# process rounds tiny numbers.
KERNEL = (
    Path(__file__).with_name("decode.cpp"),
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
    "-ffinite-math-only",
)
