"""How stages are run. A backend knows stages, units and barriers, and nothing of what they compute."""

from __future__ import annotations

from untwin.backends.base import Executor
from untwin.errors import ParameterError

BACKENDS = ("local", "ray", "xenna")


def make_executor(
    backend: str = "local", workers: int | None = None, memory: int | None = None, ray_address: str | None = None
) -> Executor:
    """The backend of a name.

    Args:
        backend: One of `BACKENDS`.
        workers: Most units of work at a time; default: all cores.
        memory: Bytes that the data in work may take on each machine.
        ray_address: Of a running cluster, for `ray` and `xenna`.

    Raises:
        ParameterError: No such backend.
        MissingExtraError: It needs packages that are not installed.
        ResourceError: Its cluster cannot be reached.
    """
    if backend == "ray":
        from untwin.backends.ray import RayExecutor

        return RayExecutor(ray_address, workers, memory)
    if backend == "xenna":
        from untwin.backends.xenna import XennaExecutor

        return XennaExecutor(ray_address, workers, memory)
    if backend != "local":
        raise ParameterError(f"backend is {backend!r}; known are {', '.join(BACKENDS)}")
    if ray_address is not None:
        raise ParameterError(f"ray_address is {ray_address!r}, but backend is 'local'; give backend 'ray', too")
    from untwin.backends.local import LocalExecutor

    return LocalExecutor(workers, memory)
