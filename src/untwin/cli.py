"""The command line: parses, calls a job, prints. No logic.

Exit codes: 0 done; 1 an unexpected failure; 2 a user's mistake or damaged input; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from untwin.errors import ParameterError, UntwinError
from untwin.printing import audit_lines, embedded_lines, report_lines, row_lines, run_lines, tuned_lines

if TYPE_CHECKING:
    from untwin.backends.base import Progress
    from untwin.jobs.result import RunResult

# Of the rows' memory most is written once and read a few times: finding huge pages for it can take longer than to fill
# it, where memory is in pieces. NumPy looks at this when it is first imported, which no command has done yet.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")

F = TypeVar("F", bound=Callable[..., None])
_log = logging.getLogger("untwin")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="untwin")
def main() -> None:
    """Remove near-duplicates from a data set by its embeddings."""


def _reports_errors(command: F) -> F:
    """Print errors as one message on stderr, with the exit code that fits."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        logging.basicConfig(
            stream=sys.stderr, format="%(message)s", level=logging.DEBUG if verbose else logging.WARNING
        )
        logging.getLogger("untwin").setLevel(logging.INFO if verbose else logging.WARNING)
        logging.getLogger().setLevel(logging.WARNING)
        try:
            command(*args, **kwargs)
        except UntwinError as error:
            click.echo(f"untwin: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo(f"untwin: interrupted; {_what_is_left(kwargs)}", err=True)
            _leave_threads()
            sys.exit(130)
        except click.exceptions.Exit:
            raise
        except BrokenPipeError:
            # the reader of stdout has gone (`| head`): no failure of the work, and there is nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            if verbose:
                click.echo(_without_secrets(traceback.format_exc(), kwargs), err=True)
            said = _without_secrets(f"{type(error).__name__}: {error} {notes}", kwargs)
            click.echo(
                f"untwin: unexpected failure: {said}\n{_what_is_left(kwargs)}; -v shows where it happened", err=True
            )
            sys.exit(1)

    return run  # type: ignore[return-value]


def _without_secrets(text: str, kwargs: dict[str, Any]) -> str:
    from untwin.storage.files import hide_secrets

    with contextlib.suppress(ParameterError):
        return hide_secrets(text, _storage_options(kwargs.get("storage_options")))
    return hide_secrets(text, {})


def _leave_threads() -> None:
    """End the process at once if units are still in work: they write nothing any more, but could take long."""
    if any(thread.name.startswith("untwin") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def _what_is_left(kwargs: dict[str, Any]) -> str:
    """What there is after a failure, and what to do; never advises to delete what is finished."""
    from untwin.storage.files import redact

    command = click.get_current_context().info_name
    if command in ("show", "tune"):
        return "nothing was changed"
    if command in ("audit", "report"):
        return f"nothing in {redact(kwargs['output'])} has changed"
    if command == "undo" or kwargs.get("mode", "parquet") != "parquet":
        return "no file was overwritten or lost; the same command goes on where this one stopped"
    paths = kwargs.get("paths")
    if command == "embed":
        folder = kwargs["output"]
    else:
        answer = "" if kwargs["eps"] is None else f"/eps={kwargs['eps']!r}"
        folder = paths[-1] if paths else kwargs.get("to") or kwargs["output"].rstrip("/") + answer
    if "://" not in folder:
        if not Path(folder).exists():
            return "the input is untouched, and nothing was written"
        if (Path(folder) / "run.json").exists():
            return f"the input is untouched, and the result in {folder} is complete"
    anew = ", or starts anew with --overwrite" if paths else ""
    return (
        f"the input is untouched; {redact(folder)} holds an unfinished result: the same command goes on with it{anew}"
    )


_storage_option = click.option(
    "--storage-options",
    metavar="JSON|@FILE",
    help="fsspec options, as JSON or in a file. [default: environment]",
)
_verbose_option = click.option("-v", "--verbose", is_flag=True, help="Say more, on stderr.")
_shared = [
    click.option(
        "--memory",
        metavar="SIZE",
        help="Memory for the data, as in 4GB. [default: half of the machine's]",
    ),
    click.option("--workers", type=int, metavar="N", help="Most units of work at a time. [default: all cores]"),
    click.option(
        "--backend",
        type=click.Choice(["local", "ray", "xenna"]),
        default="local",
        show_default=True,
        help="Where the work runs: threads of this process, or a Ray cluster, by itself or through cosmos-xenna.",
    ),
    click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="auto, HOST:PORT or ray://HOST:PORT of a cluster, or local to start one. [default: RAY_ADDRESS, or local]",
    ),
    _storage_option,
    click.option("--json", "as_json", is_flag=True, help="Print run.json to stdout, and nothing else there."),
    _verbose_option,
]


_media = [
    click.option(
        "--frames", type=int, default=8, show_default=True, metavar="N", help="Of a folder of clips: frames of each."
    ),
    click.option("--encoder", metavar="MODEL.onnx", help="Turns frames into vectors. [default: EfficientNet-Lite0]"),
    click.option(
        "--encoder-options",
        metavar="YAML|@FILE",
        help="What is to be known about it, as in 'size: 224, layout: nchw'. [default: MODEL.yaml]",
    ),
    click.option("--pattern", metavar="GLOB", help="Only clips whose name or path fits it, as in '*.mp4'."),
    click.option("--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="For each clip."),
]


def _media_options(command: F) -> F:
    for option in reversed(_media):
        command = option(command)
    return command


def _shared_options(command: F) -> F:
    for option in reversed(_shared):
        command = option(command)
    return command


@main.command()
@click.argument("paths", nargs=-1, required=True, metavar="INPUT... OUTPUT")
@click.option("--eps", type=float, help="Remove a row whose similarity to a kept row is at least 1 - EPS.")
@click.option("--n-clusters", default="auto", show_default=True, metavar="auto|N", help="Number of k-means clusters.")
@click.option(
    "--probes",
    default="1",
    show_default=True,
    metavar="auto|P",
    help="Compare rows with their own and the P - 1 next-nearest clusters; needs --eps.",
)
@click.option(
    "--target-recall",
    type=float,
    default=0.999,
    show_default=True,
    metavar="R",
    help="What --probes auto tries to reach: the share of rows with a neighbour whose neighbour is compared.",
)
@click.option("--id-field", default="id", show_default=True, metavar="COLUMN", help="Column of ids.")
@click.option(
    "--embedding-field",
    default="embedding",
    show_default=True,
    metavar="COLUMN",
    help="Column of embeddings.",
)
@click.option("--metadata-fields", default="", metavar="A,B", help="Columns to carry into kmeans/.")
@click.option(
    "--which-to-keep",
    type=click.Choice(["hard", "easy", "random"]),
    help="Prefer outliers, central rows, or none. [default: hard; of clips the one of best quality stays]",
)
@click.option(
    "--rank-by", metavar="COLUMN:asc|desc,...", help="Prefer by columns, as in duration:desc,size_bytes:desc."
)
@click.option(
    "--compare-to",
    type=click.Choice(["kept", "ranked"]),
    default="kept",
    show_default=True,
    help="Remove because of kept rows only, or of any better-ranked row (SemDeDup's rule).",
)
@click.option("--pairwise-batch-size", type=int, default=1024, show_default=True, help="Rows compared at a time.")
@click.option("--embedding-dim", type=int, metavar="D", help="Wanted length of embeddings. [default: the commonest]")
@click.option("--seed", type=int, default=42, show_default=True, help="Seed of everything random.")
@click.option(
    "--input-filetype",
    type=click.Choice(["parquet", "jsonl", "npy"]),
    default="parquet",
    show_default=True,
    help="Format of the input.",
)
@click.option(
    "--on-repeated-id",
    type=click.Choice(["error", "first"]),
    default="error",
    show_default=True,
    help="The same id with different vectors: stop, or keep the first.",
)
@click.option(
    "--skip-bad-files",
    is_flag=True,
    help="Read all files first, list those that cannot be read in rejected/, and go on without them.",
)
@click.option(
    "--kept",
    type=click.Choice(["compact", "mirror", "none"]),
    default="compact",
    show_default=True,
    help="Write the rows that stay as few large files, as the input's files, or not.",
)
@click.option("--drop-intermediate", is_flag=True, help="Remove kmeans/ and pairwise/ at the end.")
@click.option("--audit", is_flag=True, help="Measure at the end what was missed at the borders of clusters.")
@click.option("--report", is_flag=True, help="Write report.html at the end.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run in OUTPUT first.")
@_media_options
@_shared_options
@_reports_errors
def run(
    paths: tuple[str, ...],
    n_clusters: str,
    probes: str,
    metadata_fields: str,
    memory: str | None,
    workers: int | None,
    backend: str,
    ray_address: str | None,
    storage_options: str | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
    which_to_keep: str | None,
    frames: int,
    encoder: str | None,
    encoder_options: str | None,
    pattern: str | None,
    timeout: float,
    **options: Any,
) -> None:
    """Find near-duplicates among the rows of INPUT, and write the data set without them to OUTPUT.

    INPUT is files, folders, globs or URLs (s3://...) of rows with embeddings. Without --eps the run stops before the
    removal and shows what each value would remove; `untwin apply` then does it.

    INPUT may be a folder of videos or images, too. They are embedded first, into OUTPUT/embeddings/, as by `untwin
    embed`; then EPS defaults to what fits the encoder.
    """
    from untwin.backends import make_executor
    from untwin.jobs.embed import EmbedParameters, prepare_run
    from untwin.jobs.parameters import RunParameters, parse_bytes

    if len(paths) < 2:
        raise ParameterError("give at least one INPUT and the OUTPUT folder")
    parameters = RunParameters(
        inputs=paths[:-1],
        output=paths[-1],
        n_clusters=_number_or_auto("--n-clusters", n_clusters),
        probes=_number_or_auto("--probes", probes),
        metadata_fields=tuple(name.strip() for name in metadata_fields.split(",") if name.strip()),
        storage_options=_storage_options(storage_options),
        which_to_keep=which_to_keep or "hard",
        **options,
    )
    executor = make_executor(backend, workers, None if memory is None else parse_bytes(memory), ray_address)
    embedding = EmbedParameters(frames, encoder, _encoder_options(encoder_options), pattern, timeout)
    with _progress() as progress:
        prepared, embedded = prepare_run(
            parameters,
            embedding,
            executor,
            progress,
            overwrite=overwrite,
            by_quality=which_to_keep is None,
            dry_run=dry_run,
        )
    if embedded is not None:
        click.echo("\n".join(embedded_lines(embedded, dry_run=dry_run)), err=as_json)
    if prepared is None:
        return
    click.echo(prepared.summary, err=as_json)
    if dry_run:
        return
    if prepared.done is not None and not prepared.to_audit and not prepared.to_report:
        click.echo(f"{prepared.folder.path}: finished already, with the same parameters and input", err=True)
    with _progress() as progress:
        result = prepared.execute(progress)
    _show(result, as_json, verbose)
    if parameters.report:
        click.echo(f"The report: {prepared.folder.page_path}", err=as_json)


@main.command()
@click.argument("output")
@click.option(
    "--eps",
    type=float,
    help="Remove a row whose similarity to a kept row is at least 1 - EPS. [default: the one in force in OUTPUT]",
)
@click.option(
    "--mode",
    type=click.Choice(["parquet", "list", "link", "copy", "move", "manifest"]),
    default="parquet",
    show_default=True,
    help="Write the data set without duplicates, or ids as text; link or copy the media of the rows that stay; move "
    "those of duplicates; list objects on S3 to remove, for S3 Batch Operations.",
)
@click.option(
    "--to",
    metavar="FOLDER",
    help="parquet: where the whole answer goes. list, manifest: where the lists go. link, copy, move: where the files "
    "go. [default: for files of link and copy none, for those of move MEDIA-duplicates; else OUTPUT/eps=EPS/, or "
    "OUTPUT if it has this eps]",
)
@click.option(
    "--kept",
    type=click.Choice(["compact", "mirror", "none"]),
    help="As in run, for parquet. [default: as the run had it]",
)
@click.option(
    "--media",
    metavar="FOLDER",
    help="Where the media are, found by id: ID.mp4, ID/CAMERA.mp4, or a path. [default: the clips of the run]",
)
@click.option(
    "--path-field", metavar="COLUMN", help="Find media by this column of paths, relative to --media, or absolute."
)
@click.option("--skip-missing", is_flag=True, help="Go on although some rows have no file.")
@click.option("--max-removed", metavar="SHARE", help="Stop before anything happens if more would go, as in 15%.")
@click.option("--group-by", metavar="COLUMN", help="--max-removed holds for each value of this column, too.")
@click.option("--dry-run", is_flag=True, help="Find the duplicates, show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask before link, copy and move.")
@_shared_options
@_reports_errors
def apply(
    output: str,
    eps: float | None,
    mode: str,
    media: str | None,
    path_field: str | None,
    skip_missing: bool,
    dry_run: bool,
    yes: bool,
    memory: str | None,
    workers: int | None,
    backend: str,
    ray_address: str | None,
    storage_options: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Act on the finished run in OUTPUT with this EPS: write, list, link, copy or move, without clustering again.

    Media are never deleted, and nothing is overwritten. `untwin undo` puts back what was moved.
    """
    from untwin.backends import make_executor
    from untwin.jobs.act import ON_FILES
    from untwin.jobs.apply import prepare_apply
    from untwin.jobs.parameters import parse_bytes
    from untwin.storage.files import Storage

    if mode in ON_FILES and not (dry_run or yes or _asks()):
        raise ParameterError(
            f"--mode {mode} asks before it begins, and there is no terminal to ask on; look with --dry-run, then give "
            "--yes; nothing was done"
        )
    with _progress() as progress:
        application = prepare_apply(
            output,
            eps=eps,
            mode=mode,
            media=media,
            path_field=path_field,
            skip_missing=skip_missing,
            executor=make_executor(backend, workers, None if memory is None else parse_bytes(memory), ray_address),
            storage=Storage(_storage_options(storage_options)),
            progress=progress,
            dry_run=dry_run,
            **options,
        )
    plan = application.plan
    if plan is not None:
        click.echo("\n".join(plan.lines), err=as_json)
        if plan.question and not (dry_run or yes) and not click.confirm(plan.question, err=as_json):
            click.echo("nothing was done", err=True)
            return
    if dry_run:
        if plan is None or as_json:
            _show(application.answer, as_json, verbose)
        return
    with _progress() as progress:
        result, done = application.execute(progress)
    click.echo("".join(f"{line}\n" for line in done), err=as_json, nl=False)
    if plan is None or as_json:
        _show(result, as_json, verbose)


@main.command()
@click.argument("output")
@click.option("--eps", type=float, help="Report this value too, and sample by it. [default: the one in force, or 0.05]")
@click.option("--seed", type=int, help="Seed of the sample. [default: that of the run]")
@click.option(
    "--min-neighbours",
    type=int,
    default=3000,
    show_default=True,
    metavar="N",
    help="Sample until N rows have a neighbour.",
)
@click.option(
    "--max-sample", type=int, default=200_000, show_default=True, metavar="N", help="Sample no more than about N rows."
)
@_shared_options
@_reports_errors
def audit(
    output: str,
    storage_options: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure what the finished run in OUTPUT missed, because similar rows fell into different clusters.

    Sampled rows are compared with all rows. The outcome goes to run.json; nothing else changes.
    """
    from untwin.jobs.audit import audit as audit_job

    with _progress() as progress:
        result = audit_job(output, storage_options=_storage_options(storage_options), progress=progress, **options)
    if as_json:
        click.echo(json.dumps(dict(result.run), indent=2, ensure_ascii=False))
        return
    click.echo("\n".join(audit_lines(result)))


@main.command()
@click.argument("folder")
@click.option("-v", "--verbose", is_flag=True, help="Say more, on stderr.")
@_reports_errors
def undo(folder: str, verbose: bool) -> None:
    """Put back the files that `untwin apply --mode move` moved to FOLDER, where no other file is in their place."""
    from untwin.jobs.act import undo as undo_job

    with _progress() as progress:
        count = undo_job(folder, progress=progress)
    click.echo(f"{count:,} files put back")


@main.command()
@click.argument("output")
@click.option("--group-by", metavar="COLUMN", help="Count duplicates for each value of this column.")
@click.option("--media", metavar="FOLDER", help="Where the clips are, for pictures. [default: those of the run]")
@click.option("--open", "open_page", is_flag=True, help="Show the page in the browser.")
@_storage_option
@_verbose_option
@_reports_errors
def report(
    output: str,
    group_by: str | None,
    media: str | None,
    open_page: bool,
    storage_options: str | None,
    verbose: bool,
) -> None:
    """Write report.html, a page that shows what the finished run in OUTPUT did, and what other thresholds would do.

    OUTPUT is the folder of a run, or an answer of `untwin apply`.
    """
    from untwin.jobs.report import make_report
    from untwin.storage.files import is_remote

    if open_page and is_remote(output):
        raise ParameterError(f"--open shows pages on the local disk only; {output} is not")
    with _progress() as progress:
        page, found = make_report(
            output,
            group_by=group_by,
            media=media,
            storage_options=_storage_options(storage_options),
            progress=progress,
        )
    click.echo("\n".join(report_lines(page, found)))
    if open_page:
        import webbrowser

        if not webbrowser.open(Path(page).as_uri()):
            click.echo("There is no browser to show it in here; open the page elsewhere.", err=True)


@main.command()
@click.argument("output")
@click.argument("row_id", metavar="ID")
@click.option("--limit", type=int, default=20, show_default=True, metavar="N", help="List N duplicates of its group.")
@_storage_option
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@_verbose_option
@_reports_errors
def show(output: str, row_id: str, limit: int, storage_options: str | None, as_json: bool, verbose: bool) -> None:
    """Say why the row ID of the finished run in OUTPUT was removed, or why it stays.

    OUTPUT is the folder of a run, or an answer of `untwin apply`.
    """
    from untwin.jobs.show import show as show_job

    found = show_job(output, row_id, limit=limit, storage_options=_storage_options(storage_options))
    click.echo(_as_json(found) if as_json else "\n".join(row_lines(found)))


@main.command()
@click.argument("labels", metavar="LABELS.csv")
@click.option(
    "--precision",
    type=float,
    default=0.95,
    show_default=True,
    metavar="P",
    help="Wanted share of same pairs among those that the threshold takes.",
)
@_storage_option
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@_verbose_option
@_reports_errors
def tune(labels: str, precision: float, storage_options: str | None, as_json: bool, verbose: bool) -> None:
    """Suggest an eps from labelled pairs, with precision and recall at each value.

    LABELS.csv is what the report page gives to download: pairs marked as same or different.
    """
    from untwin.jobs.tune import tune as tune_job

    tuned = tune_job(labels, precision=precision, storage_options=_storage_options(storage_options))
    click.echo(_as_json(tuned) if as_json else "\n".join(tuned_lines(tuned)))


@main.command()
@click.argument("clips")
@click.argument("output")
@_media_options
@_shared_options
@_reports_errors
def embed(
    clips: str,
    output: str,
    encoder_options: str | None,
    storage_options: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Compute a vector for each video and image below CLIPS, into OUTPUT/embeddings/.

    Clips that were embedded before, in the same way, and have not changed are not decoded again. OUTPUT can be an INPUT
    of `untwin run`, which embeds folders of media by itself.
    """
    from untwin.jobs.embed import embed as embed_job

    with _progress() as progress:
        found = embed_job(
            clips,
            output,
            encoder_options=_encoder_options(encoder_options),
            storage_options=_storage_options(storage_options),
            progress=progress,
            **options,
        )
    click.echo(_as_json(found) if as_json else "\n".join(embedded_lines(found)))


def _encoder_options(text: str | None) -> dict[str, Any]:
    """Parse --encoder-options: `size: 224, layout: nchw`, with or without braces, or a file."""
    if text is None:
        return {}
    from untwin.media.encoder import parse_options

    if text.startswith("@"):
        try:
            return parse_options(Path(text[1:]).read_text(encoding="utf-8"), text[1:])
        except (OSError, UnicodeDecodeError) as error:
            raise ParameterError(f"--encoder-options: {text[1:]} cannot be read ({error})") from None
    return parse_options(text if text.lstrip().startswith("{") else f"{{{text}}}", "--encoder-options")


def _asks() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def _number_or_auto(name: str, text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise ParameterError(f"{name} is {text!r}; give a number, or auto") from None


def _storage_options(text: str | None) -> dict[str, Any]:
    """Parse --storage-options; a mistake is reported without its content, which may be secret."""
    if text is None:
        return {}
    try:
        content = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
    except OSError as error:
        raise ParameterError(f"--storage-options: {text[1:]} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ParameterError(f"--storage-options: {text[1:]} is not text in UTF-8") from None
    try:
        options = json.loads(content)
    except ValueError:
        raise ParameterError('--storage-options is not JSON; give an object such as {"anon": true}') from None
    if not isinstance(options, dict):
        raise ParameterError('--storage-options is not a JSON object; give one such as {"anon": true}')
    return options


class _progress:  # noqa: N801 - used as a context manager
    """A progress bar for each stage, on a terminal; what others print in the meantime goes to stderr, too."""

    def __enter__(self) -> Progress | None:
        self._bar: Any = None
        self._redirected = contextlib.redirect_stdout(sys.stderr)  # Ray tells of lost nodes on stdout
        self._redirected.__enter__()
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bar = Bars(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[units]} units"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        return _Bars(self._bar)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._redirected.__exit__(None, None, None)


class _Bars:
    """Passes progress on to rich."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def start(self, name: str, n_rows: int) -> None:
        self._task = self._bars.add_task(name, total=max(1, n_rows), units=0, rate="")

    def advance(self, n_rows: int) -> None:
        self._bars.advance(self._task, n_rows)
        task = next(task for task in self._bars.tasks if task.id == self._task)
        rate = f"{task.completed / task.elapsed:,.0f} rows/s" if task.elapsed else ""
        self._bars.update(self._task, units=task.fields["units"] + 1, rate=rate)

    def finish(self) -> None:
        task = next(task for task in self._bars.tasks if task.id == self._task)
        if (task.completed and task.completed >= task.total) or task.total == 1:
            self._bars.update(self._task, completed=task.total)
        self._bars.stop_task(self._task)


def _show(result: RunResult, as_json: bool, verbose: bool) -> None:
    if as_json:
        click.echo(json.dumps(dict(result.run), indent=2, ensure_ascii=False))
        return
    if verbose:
        for stage in result.timings:
            _log.info("%-20s %9.2f s %12s rows/s", stage.name, stage.seconds, f"{stage.rows_per_second:,}")
    click.echo("\n".join(run_lines(result)))


def _as_json(result: Any) -> str:
    return json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False)
