"""Whatever the files hold, a run ends in the right answer or in an error that has a name."""

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from inputs import snapshot
from oracle import check_output, judge
from strategies import embedding_files
from untwin import deduplicate, errors
from untwin.cli import main

_COMMON = {
    "deadline": timedelta(seconds=60),
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    "database": None,
}


def by_command(source, output, options):
    """Run the command line; the name of the error of a refused run, or nothing."""
    arguments = []
    for name, value in options.items():
        arguments += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    result = CliRunner().invoke(main, ["run", str(source), str(output), *arguments])
    assert result.exit_code in (0, 2), result.output
    assert "Traceback" not in result.output
    return "" if result.exit_code == 0 else "by command"


def by_function(source, output, options):
    """Call the job; the name of the error of a refused run, or nothing."""
    try:
        deduplicate(str(source), str(output), **options)
    except errors.UntwinError as error:
        return type(error).__name__
    return ""


def check(case, run):
    """Run a case, and hold what came of it against the oracle."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in"), Path(folder, "out")
        paths = case.write(source)
        before = snapshot(source)
        expected = judge(paths, case.options)
        failed = run(source, output, case.options)
        assert snapshot(source) == before
        assert {path.name for path in Path(folder).iterdir()} <= {"in", "out"}
        event(f"ended with {', '.join(sorted(expected.errors)) or 'an answer'}")
        if expected.errors or (failed and expected.may_fail):
            assert failed in expected.errors | expected.may_fail | {"by command"}
            return
        assert not failed
        check_output(output, expected, case.options)


@settings(max_examples=30, derandomize=True, **_COMMON)
@given(embedding_files())
def test_generated_files_end_in_the_right_answer_or_a_named_error(case):
    check(case, by_function)


@settings(max_examples=10, derandomize=True, **_COMMON)
@given(embedding_files())
def test_so_they_do_from_the_command_line(case):
    check(case, by_command)


@pytest.mark.slow
@settings(max_examples=500, print_blob=True, **_COMMON)
@given(embedding_files(), st.sampled_from([by_function, by_function, by_function, by_command]))
def test_many_generated_files_end_in_the_right_answer_or_a_named_error(case, run):
    check(case, run)
