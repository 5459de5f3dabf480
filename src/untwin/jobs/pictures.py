"""Pictures of the rows that a report shows, from their media files."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from untwin.backends.base import Progress
from untwin.media.decode import require
from untwin.media.find import MediaFolder, list_media
from untwin.media.strips import Sprite, strips
from untwin.report.data import Strip
from untwin.storage.files import Storage

_NO_FILE = "no media file has this id"
_SEVERAL = "media files at several places have this id"


def open_media(storage: Storage, folder: str) -> MediaFolder:
    """The media files of a folder.

    Raises:
        InputNotFoundError: There is no such folder, or no media in it.
        MissingExtraError: They cannot be decoded without the extra `video`.
    """
    require()
    return list_media(storage, folder)


def pictures(media: MediaFolder, ids: pa.Array, progress: Progress) -> Iterator[Strip | str]:
    """A picture for each id, of its first file, or of its preview where Curator made one; or why there is none.

    Args:
        media: Where the files are.
        ids: Of rows, each once.
        progress: Gets told how far the work is.
    """
    matches = media.match_ids(ids)
    rows, first = np.unique(matches.rows, return_index=True)
    files = dict(zip(rows.tolist(), matches.files[first].tolist(), strict=True))
    ambiguous = set(matches.ambiguous.tolist())
    paths: list[str | None] = []
    for row, value in enumerate(ids.to_pylist()):
        preview = media.preview_of(value)
        found = None if row in ambiguous or row not in files else media.file(files[row])
        paths.append(preview.path if preview is not None else found.path if found is not None else None)
    progress.start("pictures", len(paths))
    made = strips(media.storage, [path for path in paths if path is not None], progress=progress.advance)
    for row, path in enumerate(paths):
        if path is None:
            yield _SEVERAL if row in ambiguous else _NO_FILE
        else:
            yield _strip(next(made))
    progress.finish()


def _strip(made: Sprite | str) -> Strip | str:
    if isinstance(made, str):
        return made
    uri = f"data:image/jpeg;base64,{base64.b64encode(made.jpeg).decode()}"
    return Strip(uri, made.frames, made.width, made.height)
