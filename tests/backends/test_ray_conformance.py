"""Ray does what every backend has to, on a real Ray that this process starts."""

from typing import ClassVar

import pytest
from conformance import Conformance, expected, source  # noqa: F401 - fixtures

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
