"""The numbers of docs/scaling.md are those of the plan."""

import re
from pathlib import Path

import numpy as np
import pytest

from untwin.plan import make_plan, split_evenly

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "scaling.md").read_text()
SIZES = {
    line.split("|")[1].strip(): [
        int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", line.split("|")[4])
    ]
    for line in PAGE[: PAGE.index("## Requests")].splitlines()
    if line.count("|") == 5
}


@pytest.fixture(scope="module")
def sizes():
    """Symbol → number, from the plan."""
    n_rows, dim, n_clusters = SIZES["N, D, K"]
    (n_files,) = SIZES["F"]
    plan = make_plan(np.full(n_files, n_rows // n_files), dim=dim, n_clusters=n_clusters)
    groups = split_evenly(np.full(n_clusters, plan.vector_bytes // n_clusters), plan.unit_bytes)
    found = {"V": plan.vector_bytes, "B": plan.unit_bytes, "U": len(plan.input_units) - 1, "G": len(groups) - 1}
    found |= {"S": found["U"] * found["G"], "P": plan.id_partitions}
    return found | {"V/S": found["V"] // found["S"]}


def test_sizes_are_those_of_the_plan(sizes):
    assert len(sizes) == 7
    for symbol, number in sizes.items():
        assert SIZES[symbol] == [number], symbol


def test_the_index_and_the_requests_follow_from_them(sizes):
    U, G, P = sizes["U"], sizes["G"], sizes["P"]
    assert f"{8 * (G + 1) * U:,}" in PAGE
    assert f"{16 * U:,}" in PAGE
    n_clusters, (n_files,) = SIZES["N, D, K"][2], SIZES["F"]
    for stage, formula, number in (
        ("listing", "3·F", 3 * n_files),
        ("sample", "4·F", 4 * n_files),
        ("assign", "4·F", 4 * n_files),
        ("repeated ids", "P·(U + 1) + U", P * (U + 1) + U),
        ("gather", "G·(U + 1) + 2·U + 2·K", G * (U + 1) + 2 * U + 2 * n_clusters),
        ("pairwise, select", "2·K + 2·G", 2 * n_clusters + 2 * G),
        ("remove", "5·F + 2·G", 5 * n_files + 2 * G),
    ):
        (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {stage} |") and "here" not in line)
        assert [cell.strip() for cell in line.split("|")[4:6]] == [formula, f"{number / 1e6:.1f} M"]


def test_slices_keep_their_size_until_units_reach_their_largest():
    for n_rows in (10**7, 10**8, 10**9, 2 * 10**9):
        plan = make_plan(np.full(n_rows // 5000, 5000), dim=512, n_clusters=1000)
        slice_bytes = plan.unit_bytes**2 / plan.vector_bytes
        assert slice_bytes == pytest.approx(256 << 10, rel=0.01)
    most = make_plan(np.full(10**6, 10_000), dim=512, n_clusters=1000)
    assert most.unit_bytes == 1 << 30
    least = make_plan(np.full(10, 1000), dim=512, n_clusters=10)
    assert (least.unit_bytes, len(least.input_units)) == (32 << 20, 2)
