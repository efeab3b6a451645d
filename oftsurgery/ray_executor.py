""":class:`RayExecutor` gives tasks to Ray. This file imports Ray when an executor is made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from .errors import EngineError, needs, printable


class RayExecutor(Executor):
    """A ``concurrent.futures.Executor`` over Ray's tasks, spread over the nodes of a cluster.

    >>> with oftsurgery.RayExecutor(cpus_per_task=4) as executor:                               # doctest: +SKIP
    ...     record = oftsurgery.fold_checkpoint("BASE", "ADAPTER", "OUTPUT", executor=executor)

    ``executor="ray"`` is ``RayExecutor()``. Ray itself runs a task again whose worker or node is lost.

    Args:
        address: the address of the cluster, such as ``"auto"`` or ``"ray://head:10001"``; None: the cluster of ``RAY_ADDRESS``,
            or a new one on this machine. A program that has called ``ray.init`` keeps its cluster.
        cpus_per_task: the processors that Ray keeps for each task; Ray also gives the arithmetic this number of threads.
        gpus_per_task: the GPUs that Ray keeps for each task; the arithmetic runs on a GPU where ``device="cuda"``.

    Raises:
        MissingDependencyError: Ray is not installed.
        EngineError: the cluster cannot be reached.
    """

    #: how often Ray runs a task whose worker is lost
    RETRIES = 4

    def __init__(self, address: str | None = None, *, cpus_per_task: float = 1, gpus_per_task: float = 0) -> None:
        with needs("ray", "pip install 'oftsurgery[ray]'"):
            import ray
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            except Exception as error:  # Ray raises errors of several kinds
                message = f"Ray's cluster cannot be reached: {printable(error)}"
                raise EngineError(message, remedy="give the address of a running cluster (--ray ADDRESS)") from error
        self._call = ray.remote(_call).options(
            num_cpus=cpus_per_task,
            num_gpus=gpus_per_task,
            max_retries=self.RETRIES,
            scheduling_strategy="SPREAD",
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        place = self._call.remote(fn, args, kwargs)
        future = _RayFuture(lambda: self._ray.cancel(place))
        future.set_running_or_notify_cancel()
        place.future().add_done_callback(future.take)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        del wait, cancel_futures
        if self._own:
            self._ray.shutdown()


class _RayFuture(Future[Any]):
    """A future whose ``cancel`` asks Ray; the future ends when the task has ended."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        super().__init__()
        self._cancel = cancel

    def cancel(self) -> bool:
        if not self.done():
            self._cancel()
        return False

    def take(self, ended: Future[Any]) -> None:
        error = ended.exception()
        if error is None:
            self.set_result(ended.result())
        else:
            self.set_exception(error)


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)
