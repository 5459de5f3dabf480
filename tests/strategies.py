"""Hypothesis strategies for embedding files, as good and as odd as people have them. No tests here."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

FLOATS = {"halffloat": pa.float16(), "float": pa.float32(), "double": pa.float64()}

ODD_IDS = [
    "",
    " ",
    "a/b",
    "..",
    "../../outside",
    "/etc/passwd",
    "two\nlines",
    "tab\tand \x00 and \x1b[31m",
    "🙂👩‍👩‍👧",
    "ﬁ e\u0301 é",
    "centroid=0",
    "null",
    "nan",
    "x" * 10_000,
]
"""Text that breaks what takes ids for file names, lines or words."""

FILE_NAMES = [
    "a.parquet",
    "b c.parquet",
    "sub/a.parquet",
    "ü🙂.parquet",
    "x[1]*.parquet",
    "new\nline.parquet",
    "z%20.PARQUET",
]

KINDS = [
    "base",
    "base",
    "near",
    "near",
    "loose",
    "double",
    "huge",
    "small",
    "negative",
    "random",
    "null",
    "empty",
    "hole",
    "nan",
    "inf",
    "zero",
    "denormal",
    "short",
]
"""What a row's vector can be; the first ten can be judged."""
_GOOD = 10


@dataclass(frozen=True)
class InputFile:
    """One file: its table, and how it is written."""

    name: str
    table: pa.Table
    row_groups: list[int]
    options: dict = field(default_factory=dict)

    def write(self, folder):
        """Write it below a folder; a row group for each number of rows."""
        path = Path(folder) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        start = 0
        with pq.ParquetWriter(path, self.table.schema, **self.options) as writer:
            for count in self.row_groups:
                writer.write_table(self.table.slice(start, count))
                start += count
        return str(path)

    def write_lines(self, folder):
        """Write it as JSON lines, in which what JSON cannot say is null, and nulls of other columns may be left out."""
        path = Path(folder) / f"{self.name.rpartition('.')[0]}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, row in enumerate(self.table.drop_columns(list({"day"} & {*self.table.column_names})).to_pylist()):
            if row.get("embedding") is not None:
                row["embedding"] = [float(x) if x is not None and np.isfinite(x) else None for x in row["embedding"]]
            values = {
                name: value
                for name, value in row.items()
                if value is not None or number % 2 or name in ("id", "embedding", "size")
            }
            lines.append(json.dumps(values, ensure_ascii=number % 3 == 0) + ("\n\n" if number % 5 == 0 else "\n"))
        path.write_text("".join(lines), newline="")
        return str(path)


@dataclass(frozen=True)
class EmbeddingFiles:
    """Files, and the options of a run on them."""

    files: list[InputFile]
    options: dict

    def write(self, folder):
        """Write all files; their paths, in the order in which rows count."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        lines = self.options.get("input_filetype") == "jsonl"
        return sorted(file.write_lines(folder) if lines else file.write(folder) for file in self.files)


def vector(kind, base, rng):
    """A row's vector (float64, or None) of a kind, made from a base vector."""
    dim = len(base)
    match kind:
        case "near":
            return base + 0.02 * rng.normal(size=dim)
        case "loose":
            return base + 0.3 * rng.normal(size=dim)
        case "double":
            return base * 2.0 ** int(rng.integers(-3, 4))
        case "huge":
            return base * 1e30
        case "small":
            return base * 1e-30
        case "negative":
            return -base
        case "random":
            return rng.normal(size=dim)
        case "null":
            return None
        case "empty":
            return []
        case "short":
            return base[:-1] if dim > 1 else np.ones(2)
        case "zero":
            return np.where(rng.random(dim) < 0.5, 0.0, -0.0)
        case "denormal":
            return np.where(np.arange(dim) == 0, 5e-324, 0.0)
        case "hole" | "nan" | "inf":
            odd = {"hole": None, "nan": np.nan, "inf": -np.inf}[kind]
            values = list(base)
            values[int(rng.integers(dim))] = odd
            return values
    return base


@st.composite
def _rows(draw):
    """Vectors of all rows, and what makes them look alike or not."""
    dim = draw(st.sampled_from([1, 2, 3, 3, 8, 8, 17, 17, 64, 4096]))
    seed = draw(st.integers(0, 2**32 - 1))
    n_rows = draw(st.integers(1, 12 if dim > 1000 else 60))
    n_bases = draw(st.integers(1, 6))
    shape = draw(st.sampled_from(["mixed", "mixed", "good", "good", "good", "identical"]))
    rng = np.random.default_rng(seed)
    bases = rng.normal(size=(n_bases, dim))
    if draw(st.booleans()):
        bases = np.round(2 * bases)  # many equal similarities, zeros, repeated bases
        bases[(bases == 0).all(axis=1)] = 1
    if shape == "identical":
        return [bases[0]] * n_rows, rng
    kinds = st.sampled_from(KINDS[:_GOOD] if shape == "good" else KINDS + 2 * KINDS[:_GOOD])
    chosen = draw(st.lists(kinds, min_size=n_rows, max_size=n_rows))
    return [vector(kind, bases[rng.integers(n_bases)], rng) for kind in chosen], rng


def _embedding_array(vectors, layout, kind):
    """Vectors as an Arrow array; a fixed-size list cannot hold other lengths, so these become nulls."""
    if layout == "fixed_size_list":
        lengths = [len(row) for row in vectors if row is not None and len(row)]
        width = max(lengths, key=lengths.count, default=3)
        vectors = [row if row is not None and len(row) == width else None for row in vectors]
        target = pa.list_(kind, width)
    else:
        target = pa.list_(kind) if layout == "list" else pa.large_list(kind)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if pa.types.is_integer(kind):
            plain = [None if row is None else [0 for _ in row] for row in vectors]
        else:
            dtype = kind.to_pandas_dtype()
            plain = [None if row is None else [None if x is None else dtype(x) for x in row] for row in vectors]
    return pa.array(plain, target)


def _id_array(ids, kind):
    match kind:
        case "dictionary":
            return pa.array(ids, pa.string()).dictionary_encode()
        case "fixed_binary":
            return pa.array(ids, pa.binary(16))
    return pa.array(ids, {"string": pa.string(), "large_string": pa.large_string()}.get(kind) or getattr(pa, kind)())


@st.composite
def _ids(draw, n_rows, rng):
    """Ids of one family, and the types that its files may give them."""
    family = draw(st.sampled_from(["text", "text", "text", "int32", "int64", "bytes"]))
    if family == "text":
        ids = [f"row{number:03}" for number in rng.permutation(n_rows)]
        odd = [ODD_IDS[at] for at in draw(st.permutations(range(len(ODD_IDS))))][: draw(st.integers(0, 5))]
        odd += draw(st.lists(st.text(max_size=20).filter(lambda text: text not in ODD_IDS), max_size=3, unique=True))
        for place, text in zip(rng.permutation(n_rows), odd, strict=False):
            ids[place] = text
        kinds = ["string", "large_string", "dictionary"]
    elif family == "bytes":
        ids = [bytes(rng.integers(0, 256, 16, dtype=np.uint8)) for _ in range(n_rows)]
        kinds = draw(st.sampled_from([["fixed_binary"], ["binary", "large_binary"]]))
    else:
        ids = [int(number) for number in rng.permutation(n_rows) - n_rows // 2]
        if draw(st.booleans()):
            ids[0] = (1 << (31 if family == "int32" else 63)) - 1
            ids[-1] = -ids[0] - 1
        kinds = ["int32", "int64"] if family == "int32" else ["int64"]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        ids[rng.integers(n_rows)] = None
    return ids, kinds


@st.composite
def _file(draw, name, ids, vectors, id_kinds, rng, odd_types):
    n_rows = len(ids)
    layout = draw(st.sampled_from(["list", "large_list", "fixed_size_list"]))
    kind = draw(st.sampled_from([*FLOATS.values(), pa.float32(), pa.float64()]))
    id_kind = draw(st.sampled_from(id_kinds))
    if odd_types == "integers":
        kind = pa.int32()
    columns = {"id": _id_array(ids, id_kind), "embedding": _embedding_array(vectors, layout, kind)}
    if odd_types == "other ids":
        text = pa.array([f"n{number}" for number in range(n_rows)])
        columns["id"] = (
            pa.array(range(n_rows), pa.int64()) if id_kind in ("string", "large_string", "dictionary") else text
        )
    if odd_types == "no embedding":
        del columns["embedding"]
    columns["size"] = pa.array(
        [None if rng.random() < 0.1 else int(rng.integers(5)) for _ in range(n_rows)], pa.int64()
    )
    for extra in draw(st.lists(st.sampled_from(["caption", "meta", "day"]), unique=True)):
        values = {
            "caption": pa.array([f"caption {number} …" for number in range(n_rows)], pa.string()).dictionary_encode(),
            "meta": pa.array(
                [{"fps": 24.0, "tags": ["a", None]}] * n_rows,
                pa.struct([("fps", pa.float64()), ("tags", pa.list_(pa.string()))]),
            ),
            "day": pa.array([number * 86_400_000 for number in range(n_rows)], pa.timestamp("ms", "UTC")),
        }
        columns[extra] = values[extra]
    order = draw(st.permutations(list(columns)))
    row_groups, left = [], n_rows
    while left:
        row_groups.append(draw(st.integers(0, left)) if len(row_groups) < 5 else left)
        left -= row_groups[-1]
    if draw(st.booleans()):
        row_groups.append(0)
    options = {
        "compression": draw(st.sampled_from(["none", "snappy", "zstd", "gzip", "lz4", "brotli"])),
        "use_dictionary": draw(st.booleans()),
        "data_page_version": draw(st.sampled_from(["1.0", "2.0"])),
        "data_page_size": draw(st.sampled_from([200, 1 << 20])),
        "write_page_checksum": draw(st.booleans()),
        "store_schema": draw(st.booleans()),
    }
    return InputFile(name, pa.table({key: columns[key] for key in order}), row_groups, options)


@st.composite
def embedding_files(draw):
    """One to four Parquet files of embeddings, and the options of a run that are to give an answer or a clear error."""
    vectors, rng = draw(_rows())
    ids, id_kinds = draw(_ids(len(vectors), rng))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 4]))):  # an id again, with its vector or with another one
        source = int(rng.integers(len(ids)))
        ids.append(ids[source])
        vectors.append(vectors[source if draw(st.booleans()) else int(rng.integers(len(vectors)))])
    names = draw(st.lists(st.sampled_from(FILE_NAMES), min_size=1, max_size=4, unique=True))
    bounds = sorted(draw(st.lists(st.integers(0, len(ids)), min_size=len(names) - 1, max_size=len(names) - 1)))
    odd_types = draw(st.sampled_from([""] * 24 + ["integers", "other ids", "no embedding"]))
    odd_file = draw(st.integers(0, len(names) - 1))
    files = []
    for number, (name, low, high) in enumerate(zip(names, [0, *bounds], [*bounds, len(ids)], strict=True)):
        odd = odd_types if number == odd_file else ""
        files.append(draw(_file(name, ids[low:high], vectors[low:high], id_kinds, rng, odd)))
    options = {
        "eps": draw(st.sampled_from([0.0513, 0.0513, 0.2071, 0.0029, 1e-7, 0.61])),
        "n_clusters": draw(st.sampled_from(["auto", "auto", 1, 2, 3, 7])),
        "which_to_keep": draw(st.sampled_from(["hard", "easy", "random"])),
        "rank_by": draw(st.sampled_from([None, None, None, "size:desc", "size:asc,id:desc", "id:asc"])),
        "compare_to": draw(st.sampled_from(["kept", "ranked"])),
        "kept": draw(st.sampled_from(["compact", "mirror"])),
        "on_repeated_id": draw(st.sampled_from(["first", "first", "error"])),
        "embedding_dim": draw(st.sampled_from([None] * 6 + [8])),
        "pairwise_batch_size": draw(st.sampled_from([1024, 5])),
        "workers": draw(st.sampled_from([1, 2])),
        "seed": draw(st.sampled_from([42, 7])),
    }
    if id_kinds[0] in ("string", "int32", "int64") and draw(st.sampled_from([False, False, False, True])):
        options["input_filetype"] = "jsonl"
    return EmbeddingFiles(files, options)
