"""Fixtures that tests of all parts share. Helpers that make and read data are in `inputs`."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest

_SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "debian-packages-sample.parquet"


class Debian(NamedTuple):
    """Real vectors with real near-duplicates: a file or folder, its Parquet files, and clusters that suit it."""

    path: str
    files: list[str]
    n_clusters: int
    whole: bool


@pytest.fixture(scope="session")
def debian_sample():
    """The sample in the repository."""
    return Debian(str(_SAMPLE), [str(_SAMPLE)], 8, False)


@pytest.fixture(scope="session")
def debian(debian_sample):
    """The whole debian-packages set if UNTWIN_DEBIAN_PACKAGES names its folder, else the sample in the repository."""
    folder = os.environ.get("UNTWIN_DEBIAN_PACKAGES")
    if folder:
        files = sorted(str(path) for path in Path(folder).glob("*.parquet"))
        assert files, f"UNTWIN_DEBIAN_PACKAGES: no Parquet files in {folder}"
        return Debian(folder, files, 64, True)
    return debian_sample
