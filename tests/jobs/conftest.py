"""Fixtures that tests of jobs share."""

import pytest
from recall_oracle import brute_force

from untwin import deduplicate


@pytest.fixture(scope="session")
def whole(debian, tmp_path_factory):
    """A finished run (eps 0.1) over all the data there are, and the truth about it."""
    output = tmp_path_factory.mktemp("whole") / "out"
    n_clusters = "auto" if debian.whole else 60
    deduplicate(debian.path, output, eps=0.1, n_clusters=n_clusters, kept="none")
    return output, brute_force(output, 0.1)
