"""What commands print: results as lines of text. No computation, and nothing is written."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from untwin.errors import one_line

if TYPE_CHECKING:
    from untwin.jobs.embed import Embedded
    from untwin.jobs.result import RunResult
    from untwin.jobs.show import Beside, Shown
    from untwin.jobs.tune import Tuned
    from untwin.report.data import Report


def shown(text: str, most: int = 60) -> str:
    """An id on one line of a terminal, and not endless."""
    return one_line(text, most)


def run_lines(result: RunResult) -> list[str]:
    """What a run did."""
    rows = result.run["rows"]
    lines = [
        "",
        f"rows        {result.n_rows:>14,}",
        *([f"kept        {result.n_kept:>14,}"] if result.eps is not None else []),
        *(
            [f"duplicates  {result.n_duplicates:>14,}  ({result.duplicate_share:.1%})"]
            if result.eps is not None
            else []
        ),
        f"rejected    {result.n_rejected:>14,}",
        *_clips_line(result.run.get("media")),
        *[f"  {reason}: {count:,}" for reason, count in rows["rejected_reasons"].items()],
        *([f"skipped     {result.n_skipped_files:>14,}  files that cannot be read"] if result.n_skipped_files else []),
        *_probes_line(result.run.get("borders")),
        *([f"reused      {result.n_reused:>14,}  units of an interrupted run"] if result.n_reused else []),
        f"time        {result.seconds:>12,.1f} s   peak memory {result.peak_memory / 1e6:,.0f} MB",
        "",
        "   eps    duplicates   share",
    ]
    examples = result.eps is None
    for row in result.eps_rows:
        bound = "" if row.exact else " at most"
        mark = "  <- in force" if row.eps == result.eps else ""
        lines.append(f"{row.eps:>6g} {row.duplicates:>13,} {row.share:>7.1%}{bound}{mark}")
        if examples:
            lines += [f"           {score:.4f}  {shown(one)}  ~  {shown(other)}" for one, other, score in row.examples]
    lines.append("")
    lines += [*audit_lines(result), ""] if result.audit else []
    if result.eps is None:
        lines += [
            "No threshold was given, so nothing was removed. Look at the pairs above: each line shows pairs that",
            f"this value of eps adds. Choose a value, then: untwin apply {shlex.quote(result.output_path)} --eps VALUE",
        ]
    else:
        origin = result.run.get("applied_to", {}).get("path", result.output_path)
        lines += [f"The rows that stay: {result.kept_path}"] if result.run["parameters"]["kept"] != "none" else []
        lines += [
            f"What was removed, and because of which row: {result.duplicates_path}",
            f"Another threshold: untwin apply {shlex.quote(origin)} --eps VALUE",
        ]
    return lines


def _clips_line(media: dict[str, Any] | None) -> list[str]:
    if media is None or not media["n_rejected"]:
        return []
    return [f"            {media['n_rejected']:>14,}  more of the {media['n_clips']:,} clips gave no vector"]


def _probes_line(borders: dict[str, Any] | None) -> list[str]:
    """How many clusters a row was compared with, and the price, if not only with its own."""
    if borders is None:
        return []
    times = borders["pairs_across"] / max(1, borders["pairs_inside"])
    line = (
        f"probes      {borders['probes']:>14,}  ({times:.2f} times the pairs inside clusters were compared across them"
    )
    chosen = borders["chosen"]
    if chosen and not chosen["reached"]:
        line += f"; a recall of {chosen['target_recall']:g} could not be shown"
    return [line + ")"]


def audit_lines(result: RunResult) -> list[str]:
    """What a run missed, if that was measured."""
    found = result.audit
    if found is None:
        return []
    if found.by_construction:
        return ["audit: one cluster, so all rows were compared with each other: recall is 1 by construction"]
    lines = [
        f"audit: {found.n_sampled:,} sampled rows, compared with all {found.n_rows:,}.",
        "This is recall of cosine neighbours, not of human judgement: of the sampled rows that have another row",
        f"within eps, the share that have one {_compared_with(found.probes)}.",
        "   eps  with neighbour   recall   95 % interval",
    ]
    for row in found.recall_rows:
        mark = "  <- in force" if row.eps == result.eps else ""
        lines.append(
            f"{row.eps:>6g} {row.with_neighbour or 0:>15,}  {_percent(row.recall)}   "
            f"{_percent(row.low)} to {_percent(row.high)}{mark}"
        )
    if found.complete:
        lines.append("All rows were sampled, so these numbers are exact.")
    if not found.enough:
        lines.append(
            f"The sample ended at --max-sample before {found.min_neighbours:,} rows with a neighbour within eps "
            f"{found.eps:g} were found."
        )
    left = found.answer
    if left is not None and left.share is not None:
        lines.append(
            f"Kept rows that still have another kept row within eps {left.eps:g}: {_percent(left.share).strip()} "
            f"({_percent(left.low).strip()} to {_percent(left.high).strip()}), from {left.kept:,} kept rows"
        )
    return lines


def _compared_with(probes: int) -> str:
    if probes == 1:
        return "in their own cluster"
    return f"among the rows that they were compared with (probes {probes})"


def _percent(share: float | None) -> str:
    return "      -" if share is None else f"{share:>7.2%}"


def embedded_lines(found: Embedded, *, dry_run: bool = False) -> list[str]:
    """What came of embedding a folder of clips."""
    if dry_run:
        return [f"{found.n_clips:,} clips in {found.clips_path}, to be embedded with {found.encoder.name}"]
    lines = [
        f"{found.n_clips:,} clips in {found.clips_path}: {found.n_embedded:,} with a vector"
        + (f", {found.n_reused:,} of them from before" if found.n_reused else "")
        + (f"; {found.n_rejected:,} without" if found.n_rejected else "")
    ]
    lines += [f"  {count:>8,}  {reason}" for reason, count in found.reasons[:5]]
    if found.n_embedded > found.n_reused and found.seconds:
        lines.append(
            f"{found.seconds:,.1f} s, {(found.n_embedded - found.n_reused) / found.seconds:,.1f} clips a second, "
            f"{found.seconds_of_video / found.seconds:,.0f} times as fast as they play; encoder {found.encoder.name}"
        )
    lines.append(f"The vectors: {found.path}")
    return lines


def report_lines(page: str, found: Report) -> list[str]:
    """Where a report is, and what is in it."""
    groups = f", {len(found.groups):,} of {found.n_groups:,} groups" if found.n_groups else ""
    if found.eps is None:
        outcome = (
            f"no threshold is in force; up to {found.steps[-1].duplicates:,} duplicates at eps {found.steps[-1].eps:g}"
        )
    else:
        outcome = f"{found.n_duplicates:,} duplicates at eps {found.eps:g}, {found.n_kept:,} rows stay"
    return [
        f"The report: {page}",
        f"rows    {found.n_compared:,} compared; {outcome}",
        f"shown   {len(found.pairs):,} of the pairs{groups}",
        f"slider  eps {found.steps[0].eps:g} to {found.steps[-1].eps:g}, {len(found.steps):,} steps",
    ]


def row_lines(found: Shown) -> list[str]:
    """What is known of a row."""
    row = shown(found.id)
    outcomes = {
        "duplicate": f"{row} is removed: a row that ranks before it is within eps {found.eps}",
        "kept": f"{row} stays at eps {found.eps}",
        "compared": f"{row} was compared; the run had no eps, so nothing is decided",
        "rejected": f"{row} was rejected",
    }
    facts: list[tuple[str, str]] = []
    if found.witness is not None:
        facts.append(("because of", _beside(found.witness)))
    elif found.outcome == "duplicate":
        facts.append(("because of", "rows that are removed themselves (compare_to ranked); none within eps stays"))
    if found.nearest is not None:
        same = found.witness is not None and found.witness.id == found.nearest.id
        facts.append(("most similar", "the same row" if same else _beside(found.nearest)))
    elif found.rank is not None:
        facts.append(("most similar", "no row ranks before it"))
    if found.rank is not None:
        facts.append(("cluster", f"{found.centroid}, rank {found.rank:,} of {found.cluster_rows:,}: {found.order}"))
        facts.append(("other eps", _other_eps(found)))
    elif found.centroid is not None:
        facts.append(("cluster", str(found.centroid)))
    facts += [("ranked by", f"{shown(name)}  {shown(value)}") for name, value in found.ranked_by]
    facts += [("rejected", f"row {row.row:,} of {shown(row.file, 200)}: {row.reason}") for row in found.rejected]
    facts += [("not known", text) for text in found.gone]
    lines = [outcomes[found.outcome], *(f"  {name:<12}  {text}" for name, text in facts)]
    if found.group:
        head, *members = found.group
        lines.append(f"group of {shown(head[0])}, which stays; duplicates: {found.n_group:,}")
        lines += [
            f"  {score:.4f}  {shown(member)}{'  <- this row' if member == found.id else ''}"
            for member, score in members
        ]
        left = found.n_group - len(members)
        lines += [f"  and {left:,} more, less similar; --limit lists more"] if left else []
    elif found.outcome == "kept":
        lines.append("no row was removed because of it")
    if found.columns:
        width = max(len(shown(name)) for name, _ in found.columns)
        lines += ["columns", *(f"  {shown(name):<{width}}  {shown(value, 90)}" for name, value in found.columns)]
    return lines


def _beside(other: Beside) -> str:
    reason = f"  ranks before it: {shown(other.reason, 200)}" if other.reason else ""
    return f"{shown(other.id)}  {other.score:.4f}{reason}"


def _other_eps(found: Shown) -> str:
    """What other thresholds would do, as far as the score of a row says it."""
    limit = found.removed_from
    if limit is None:
        return "it stays at every eps"
    if found.probes > 1 and found.eps is not None and limit > found.eps:
        return f"not known beyond {found.eps:g}: rows of other clusters were compared up to there only (probes)"
    if found.compare_to == "ranked":
        return f"removed from eps {limit:g} on"
    return f"it stays below eps {limit:g} for sure; from there on it is removed if a row within eps before it stays"


def tuned_lines(tuned: Tuned) -> list[str]:
    """Thresholds and what they are worth."""
    counts = (
        f"{tuned.n_same + tuned.n_different:,} labelled pairs: {tuned.n_same:,} same, {tuned.n_different:,} different"
    )
    left_out = (
        (tuned.n_ignored, "without a label, or unsure"),
        (tuned.n_repeated, "labelled again, the same"),
        (tuned.n_changed, "labelled again otherwise: the later label counts"),
    )
    lines = ["; ".join([counts, *(f"{n:,} {what}" for n, what in left_out if n)])]
    if not tuned.weighted:
        lines.append("There is no column pairs_at_least, so each labelled pair counts the same; that is right only if")
        lines.append("they were drawn evenly from all pairs.")
    pairs = "pairs" if tuned.weighted else ""
    lines += ["", f"   eps {pairs:>12}  labelled  precision   95 % interval         recall   95 % interval"]
    for row in tuned.rows:
        marks = [
            text
            for text, chosen in (("likely", tuned.likely), ("shown", tuned.shown))
            if chosen is not None and chosen.eps == row.eps
        ]
        ends = [_percent(end) for end in (row.precision_low, row.precision_high, row.recall_low, row.recall_high)]
        n_pairs = "" if row.pairs is None else f"{row.pairs:,}"
        lines.append(
            f"{row.eps:>6g} {n_pairs:>12} {row.labelled:>9,}    {_percent(row.precision)}   {ends[0]} to {ends[1]}   "
            f"{_percent(row.recall)}   {ends[2]} to {ends[3]}{'  <- ' + ', '.join(marks) if marks else ''}"
        )
    return [*lines, "", *_suggestion_lines(tuned)]


def _suggestion_lines(tuned: Tuned) -> list[str]:
    wanted = f"a precision of {tuned.precision:g}"
    low, high = tuned.label_next
    more = f"Label more pairs with scores from {1 - high:.4g} to {1 - low:.4g}."
    if tuned.likely is None:
        return [f"No eps in the labelled range reaches {wanted}. {more}"]
    lines = [
        f"likely  eps {tuned.likely.eps:g}, the largest whose estimate reaches {wanted}; the truth can well be less"
    ]
    if tuned.shown is not None:
        return [*lines, f"shown   eps {tuned.shown.eps:g}, the largest whose whole interval does"]
    return [
        *lines,
        f"shown   none: no interval lies above {tuned.precision:g}. That takes at least {tuned.fewest_labels:,} labels "
        "above a threshold,",
        f"        if all of them are same; {tuned.likely.labelled:,} are above the likely one. {more}",
    ]
