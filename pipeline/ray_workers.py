"""Run a sweep's stages as tasks of a Ray cluster, each with the CPU, memory and GPU it needs.

Every machine needs edgepress installed, the model under the same name or path, and the store: a folder that all
share, or a URL (pipeline/store.py). A task whose worker or machine is lost is sent again by the sweep, and goes
on from the last durable step that its store holds.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.memory import size_text
from edgepress.pipeline.workers import Event, Task, Tell, carried_out

_ANSWER_SECONDS = 10.0  # for a port to open
_CONNECT_SECONDS = 30.0  # for a cluster behind it to let us in


class RayWorkers:
    """jobs: stage runs at once on each machine; a task gets that share of the smallest machine's cores."""

    def __init__(self, address: str, jobs: int, tell: Tell) -> None:
        self._ray = _connected(address, jobs)
        self._tell, self._jobs = tell, jobs
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._cpus = max(1, int(min(r.get("CPU", 0) for r in alive if r.get("CPU"))) // jobs)
        self._memory = max(r.get("memory", 0) for r in alive)
        self._gpus = max(r.get("GPU", 0) for r in alive)
        self._running: dict[Any, str] = {}  # Ray's reference to a result -> the node's key

    def free(self, task: Task) -> bool:
        slots = sum(int(n["Resources"].get("CPU", 0)) // self._cpus for n in self._ray.nodes() if n["Alive"])
        return len(self._running) < max(1, slots)

    def submit(self, task: Task) -> None:
        needs: dict[str, Any] = {"num_cpus": self._cpus, "max_retries": 0, "memory": _needed(task)}
        if self._gpus and task.recipe.device != "cpu":
            needs["num_gpus"] = 1 / self._jobs
        remote = self._ray.remote(**needs)(_on_worker)
        self._running[remote.remote(task, str(Path.cwd()))] = task.key

    def require_memory(self, tasks: list[Task]) -> None:
        """Raise PlanError for a stage that no machine could take; Ray would let it wait for ever."""
        for task in tasks:
            if _needed(task) > self._memory:
                name = task.step.stage if task.step else "source"
                raise PlanError(
                    f"{name} will need {size_text(_needed(task), 'GiB', 1)} of memory by the forecast; "
                    f"the largest machine of the Ray cluster offers {size_text(self._memory, 'GiB', 1)}"
                )

    def wait(self) -> list[Event]:
        done, _ = self._ray.wait(list(self._running), timeout=0.5)
        return [self._ended(reference, self._running.pop(reference)) for reference in done]

    def _ended(self, reference: Any, key: str) -> Event:
        errors = self._ray.exceptions
        try:
            event: Event = self._ray.get(reference)
        except errors.RayTaskError as error:  # before our own code could catch it, e.g. edgepress is not there
            return Event(key, failure=f"on the Ray worker: {error.cause!r}")
        except errors.RayError as error:  # worker killed, machine lost, out of memory
            reason = str(error).strip().splitlines()[0]
            return Event(key, failure=f"its Ray worker is gone: {type(error).__name__}: {reason}", died=True)
        return event

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running = {}
        self._ray.shutdown()


def _on_worker(task: Task, home: str) -> Event:
    """home: the folder that files are named from, where this machine has it too."""
    from edgepress.checkpoints.quiet import quiet_libraries

    quiet_libraries()
    if Path(home).is_dir():
        os.chdir(home)
    return carried_out(task, lambda text: None)


def _needed(task: Task) -> int:
    return task.step.cost.peak_memory_bytes if task.step else 0


def _connected(address: str, jobs: int) -> Any:
    """The ray module, connected. Raises PlanError with what to do where that is not possible."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise PlanError("--ray needs one more package: pip install 'edgepress[ray]'") from None
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == "local":
        options |= {"num_cpus": max(os.cpu_count() or 1, jobs), "include_dashboard": False}
    elif address != "auto":
        _require_answer(address)
    failed: list[BaseException] = []

    def connect() -> None:
        try:
            ray.init(address=address, **options)
        except BaseException as error:  # brought to the caller's thread
            failed.append(error)

    if address == "local":
        connect()  # here: Ray's own processes end with the thread that started them
    else:
        # Where something else listens at the address, Ray waits for minutes inside its own library.
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(_CONNECT_SECONDS)
        if thread.is_alive():
            raise PlanError(_no_cluster(address, f"no answer from Ray within {_CONNECT_SECONDS:.0f} s"))
    if failed:
        raise PlanError(_no_cluster(address, str(failed[0]).strip().splitlines()[0].rstrip("."))) from None
    return ray


def _require_answer(address: str) -> None:
    place = urlparse(address if "://" in address else f"ray://{address}")
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise PlanError(f"--ray {address}: give auto, local, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise PlanError(_no_cluster(address, str(error) or type(error).__name__)) from None


def _no_cluster(address: str, reason: str) -> str:
    return (
        f"no Ray cluster answers at '{address}': {reason}. `ray status` shows whether one runs; "
        "--ray local starts workers on this machine, and without --ray, --jobs N does"
    )
