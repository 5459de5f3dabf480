"""A quick report, in less than two minutes on two cores: 100,000 rows, against a copy and SemDeDup's steps.

    python benchmarks/regression.py

Ratios on a machine that does other work too say little; this is for seeing at a glance that nothing is off by a factor.
No time makes it fail. Takes the options of end_to_end.py, too.
"""

from __future__ import annotations

import sys

import end_to_end

if __name__ == "__main__":
    options = ["--rows", "100000", "--layouts", "plain", "zstd", "--against", "copy", "semdedup", "--repeat", "1"]
    raise SystemExit(end_to_end.main([*options, *sys.argv[1:]]))
