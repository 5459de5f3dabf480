"""The local backend does what every backend has to."""

from typing import ClassVar

import pytest
from conformance import Conformance, expected, source  # noqa: F401 - fixtures

from untwin.backends.local import LocalExecutor


class TestLocal(Conformance):
    options: ClassVar = {"workers": 2, "memory": "4GB"}
    executor = staticmethod(lambda: LocalExecutor(2, 4 << 30))


class TestLocalWithManyThreads(Conformance):
    options: ClassVar = {"workers": 5, "memory": "1GB"}
    executor = staticmethod(lambda: LocalExecutor(5, 1 << 30))

    pytestmark = pytest.mark.slow
