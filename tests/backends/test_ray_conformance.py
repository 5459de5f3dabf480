"""Ray does what every backend has to, on a real Ray that this process starts."""

from typing import ClassVar

import numpy as np
import pytest
from conformance import Conformance, expected, source  # noqa: F401 - fixtures

from inputs import read_folder
from untwin import embed
from untwin.backends import make_executor


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        yield
        ray.shutdown()


class TestRay(Conformance):
    options: ClassVar = {"backend": "ray", "workers": 2}
    executor = staticmethod(lambda: make_executor("ray", 2))

    def test_clips_have_the_vectors_that_one_process_gives_them(self, tmp_path):
        pytest.importorskip("av")
        from media.films import film

        clips = tmp_path / "clips"
        clips.mkdir()
        for number in range(5):
            tiles = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
            film(clips / f"{number}.mp4", "libx264", [np.kron(tiles, np.ones((8, 8, 1), np.uint8))] * 3)
        (clips / "empty.mp4").touch()
        embed(clips, tmp_path / "one", workers=1)
        found = embed(clips, tmp_path / "ray", **self.options)
        assert (found.n_embedded, found.n_rejected) == (5, 1)
        for name in ("embeddings", "rejected"):
            one, other = (read_folder(tmp_path / place / name).sort_by("id") for place in ("one", "ray"))
            assert one.equals(other)
            assert one.num_rows == {"embeddings": 5, "rejected": 1}[name]
