"""Realistic reports."""

import base64
import io
import struct
import uuid
import zlib

import numpy as np

from untwin.core import EPS_GRID
from untwin.report.data import Clip, Cluster, Group, Pair, Recall, Report, Source, Step, Strip

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=1">',
    "<!-- <script>",
    'it\'s "quoted", with a comma',
    "line\nbreak and\r\ncarriage return",
    "\u202egnp.exe",
    "\u05e9\u05dc\u05d5\u05dd-\u0645\u0631\u062d\u0628\u0627-42",
    "a\u2028b\u2029c\u200bd\ufeff\x00\x1b[31m",
    "{{ 7 * 7 }}{% raw %}",
    '=HYPERLINK("http://example.org")',
    "&lt;b&gt;&amp;",
    " spaces around ",
    "x" * 2000,
    "\U0001f600 emoji",
    "__proto__",
)


def picture(frames, width=160, height=90, seed=0, noise=0):
    """A PNG strip as a `data:` URI: frames side by side, of a colour each, with a square that moves."""
    rng = np.random.default_rng(seed)
    base, to = rng.integers(40, 200, (2, 3))
    rows = np.linspace(0, 1, height)[:, None, None]
    strip = np.concatenate(
        [np.broadcast_to(base + (to - base) * rows, (height, width, 3)).copy() for _ in range(frames)], axis=1
    )
    for i in range(frames):
        x = i * width + int((width - 30) * (i + 0.5) / frames)
        strip[20:50, x : x + 30] = 255 - base
    strip = (strip + rng.integers(0, noise + 1, strip.shape)).clip(0, 255).astype(np.uint8)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    out = io.BytesIO(b"")
    out.write(b"\x89PNG\r\n\x1a\n")
    out.write(chunk(b"IHDR", struct.pack(">IIBBBBB", frames * width, height, 8, 2, 0, 0, 0)))
    raw = np.concatenate([np.zeros((height, 1), np.uint8), strip.reshape(height, -1)], axis=1).tobytes()
    out.write(chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    return Strip("data:image/png;base64," + base64.b64encode(out.getvalue()).decode(), frames, width, height)


_CAPTION = (
    "a short walk through the harbour at dawn with boats and gulls over calm water while two people carry nets "
    "from the quay to a van parked beside the fish hall"
)
_WORDS = _CAPTION.split()


def make_report(
    *, eps=0.07, compare_to="kept", pictures=None, hostile=False, n_pairs=400, n_steps=120, audit=True, seed=0
):
    """A report as a run of some million clips gives it.

    `pictures` is None, "video" or "image"; with `hostile`, ids, texts, names and values are those of `HOSTILE` too.
    """
    rng = np.random.default_rng(seed)
    n = 12_345_678
    fine = np.linspace(0.001, 0.3, n_steps).round(4).tolist()
    all_eps = sorted({*EPS_GRID, *fine, *([] if eps is None else [eps])})
    bounds = (n * 0.31 * (1 - np.exp(-np.asarray(all_eps) * 9))).astype(int)
    exact = [compare_to == "ranked" or (eps is not None and value == eps) for value in all_eps]
    counts = [
        int(count * 0.96) if at == eps and compare_to == "kept" else int(count)
        for at, count in zip(all_eps, bounds, strict=True)
    ]
    steps = tuple(
        Step(at, count, sure, count * 3_400_123, count * 8.37)
        for at, count, sure in zip(all_eps, counts, exact, strict=True)
    )
    edges = np.linspace(0.7, 1, 121)
    bins = (
        n * 0.0009 * (0.12 + np.exp(-((edges[:-1] - 0.7) / 0.09)) + 9 * np.exp(-((1 - edges[:-1]) / 0.012)))
    ).astype(int)

    clips = []

    def clip(i):
        alike = np.random.default_rng(i // 2)  # a pair's rows are much alike
        start, duration, source = alike.integers(10), alike.uniform(6, 40), alike.integers(1, 30)
        columns = (
            ("duration_s", f"{duration - (i % 2) * rng.uniform(0, 5):.1f}"),
            ("size_bytes", f"{rng.integers(10**6, 10**8):,}"),
            ("source", f"camera-{source:02d}/front"),
            ("caption", " ".join(_WORDS[start : start + int(rng.integers(12, 16))])),
        )
        name = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        if hostile and i % 2 == 0:
            evil = HOSTILE[i // 2 % len(HOSTILE)]
            name, columns = f"{evil}{i}" if i // 2 >= len(HOSTILE) else evil, (*columns, (evil, evil))
        strip, problem = None, ""
        if pictures == "video" and i % 17 == 5:
            problem = "no picture: moov atom not found"
        elif pictures == "video":
            strip = picture(6, *((160, 90) if i // 2 % 5 else (90, 160)), seed=i // 2)
        elif pictures == "image":
            strip = picture(1, 160, 120, seed=i // 2)
        clips.append(Clip(name, int(alike.integers(2000)), columns, strip, problem))
        return len(clips) - 1

    scores = np.sort(np.append(rng.uniform(0.7, 1, max(0, n_pairs - 8)), 1 - np.asarray(EPS_GRID[4:12])))[::-1][
        :n_pairs
    ]
    pairs = []
    for i, score in enumerate(scores.astype(np.float32).astype(float).tolist()):
        removed = eps is not None and np.float32(score) >= np.float32(1 - eps) and i % 23 != 7
        reason = ["duration_s 12.4 > 8.1", "cosine_dist_to_cent 0.412 > 0.377", ""][i % 3]
        pairs.append(Pair(clip(2 * i), clip(2 * i + 1), score, bool(removed), reason, 7 * (i + 1) ** 2))
    groups = []
    if eps is not None and n_pairs:
        for size in (1830, 411, 96, 40, 17, 9, 5, 5, 3):
            shown = tuple((clip(len(clips)), 1 - 0.0007 * k) for k in range(min(size, 8)))
            groups.append(Group(clip(len(clips)), size, shown))

    grown = np.asarray(counts) / n
    values = [f"camera-{i:02d}/front" for i in range(12)]
    if hostile:
        values[:6] = HOSTILE[:6]
    sources = [
        Source(
            value,
            1_000_000 - 50_000 * i,
            tuple(((1_000_000 - 50_000 * i) * grown * (1.3 - i / 12)).astype(int).tolist()),
            None if eps is None else int((1_000_000 - 50_000 * i) * grown[all_eps.index(eps)] * (1.3 - i / 12)),
        )
        for i, value in enumerate([*values, None])
    ]
    clusters = [
        Cluster(17 * i, 8000 - 300 * i, tuple(((8000 - 300 * i) * grown * (2 - i / 15)).astype(int).tolist()))
        for i in range(20)
    ]
    in_force = next((step.duplicates for step in steps if step.eps == eps), 0)
    return Report(
        output=HOSTILE[0] + "out" if hostile else "/data/clips/2024-05/deduplicated",
        made="2024-05-04T12:09:31+00:00",
        finished="2024-05-04T11:58:02+00:00",
        eps=eps,
        compare_to=compare_to,
        n_input=n + 321,
        n_compared=n,
        n_kept=n - in_force,
        n_duplicates=in_force,
        n_rejected=321,
        size_column="size_bytes",
        duration_column="duration_s",
        total_bytes=n * 3_400_123,
        total_seconds=n * 8.37,
        steps=steps,
        bin_edges=tuple(edges.tolist()),
        bin_counts=tuple(bins.tolist()),
        n_below=n - int(bins.sum()),
        clips=tuple(clips),
        pairs=tuple(pairs),
        groups=tuple(groups),
        n_groups=1_204_331 if groups else 0,
        source_column=(HOSTILE[1] if hostile else "source"),
        sources=tuple(sources),
        clusters=tuple(clusters) if n_pairs else (),
        cluster_sizes=tuple((90_000 / np.arange(1, 201) ** 0.6).astype(int).tolist()),
        n_clusters=2000,
        recall=tuple(
            Recall(at, 0.99 - at / 3, 0.985 - at / 3, 0.994 - at / 3) if at != 0.3 else Recall(at, None, None, None)
            for at in (0.01, 0.05, 0.1, 0.3)
        )
        if audit
        else (),
        audit_note="2,000 rows were compared with all others; probes: 4." if audit else "",
        kmeans={"inertia per row": "0.4127", "mean cosine to centroid": "0.793", "iterations": "23 of 100, converged"},
        parameters={"n_clusters": 2000, "eps": eps, "compare_to": compare_to, "which_to_keep": "hard", "seed": 42}
        | ({HOSTILE[0]: HOSTILE[1]} if hostile else {}),
        packages={"untwin": "0.1.0", "numpy": "2.2.1", "pyarrow": "18.1.0", "python": "3.12.7"},
        reproduce="untwin run s3://clips/embeddings/ /data/clips/2024-05/deduplicated --eps 0.07 --n-clusters 2000"
        + (" " + HOSTILE[5] if hostile else ""),
        apply="untwin apply /data/clips/2024-05/deduplicated" + (" '" + HOSTILE[3] + "'" if hostile else ""),
    )
