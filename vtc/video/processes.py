"""The processes of one run: one, or those that `accelerate launch` has started. How they end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

from ..errors import VtcError

#: seconds until the processes of a run must have found each other
CONNECT = 300.0
#: at the end the fastest process waits for the slowest, which may take days longer
PATIENCE = timedelta(days=30)

#: where torchrun and the kinds of mpirun write how many processes there are
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes(Protocol):
    """Number `rank` of `size`."""

    rank: int
    size: int
    #: where this process computes, as torch names it; None: not said
    device: str | None

    def share(self, value: Any) -> Any:
        """The value that the first process gives; every process must call it."""
        ...

    def wait(self) -> None:
        """Until every process is here."""
        ...


class Alone:
    """A run of one process."""

    rank = 0
    size = 1
    device: str | None = None

    def share(self, value: Any) -> Any:
        return value

    def wait(self) -> None:
        pass


class Launched:
    """The processes of `accelerate launch`, on one machine or several.

    connect: seconds until all of them must be there; each may come and go as it likes later.
    """

    device: str | None

    def __init__(self, connect: float = CONNECT) -> None:
        import torch
        from accelerate import PartialState

        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        on_cpu = on_cpu or not torch.accelerator.is_available()
        try:
            with _ended_by_signals():
                self.state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=connect))
        except (RuntimeError, ValueError) as error:  # nobody there, or nothing says where
            why = str(error).partition("\n")[0].strip().rstrip(".")
            raise VtcError(
                f"the processes of this run did not find each other within {connect:g} s ({why}). "
                f"Start all of them, as `accelerate launch` does, with more seconds for slow ones "
                f"(--connect); or unset {' and '.join(_sizes())} to answer with this process alone."
            ) from error
        self.rank, self.size = self.state.process_index, self.state.num_processes
        self.device = str(self.state.device)

    def share(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        with _ended_by_signals():
            return broadcast_object_list([value])[0]

    def wait(self) -> None:
        from torch.distributed import distributed_c10d as groups

        try:
            if self.size > 1:
                groups._set_pg_timeout(PATIENCE)  # the only way to change that of a group
            with _ended_by_signals():
                self.state.wait_for_everyone()
        except RuntimeError as error:  # what a broken connection is to torch.distributed
            raise VtcError(
                "another process of this run ended early. Run the same command again; what is "
                "answered stays."
            ) from error


def started(connect: float = CONNECT) -> Processes:
    """The processes of this run, as the launcher's environment tells."""
    return Launched(connect) if _sizes() else Alone()


def _sizes() -> list[str]:
    """The variables that say that there are several processes."""
    try:
        return [name for name in SIZES if int(os.environ.get(name, 1)) > 1]
    except ValueError as error:
        said = ", ".join(f"{name}={os.environ[name]!r}" for name in SIZES if name in os.environ)
        raise VtcError(f"{said}: give a number of processes, or unset it.") from error


# ---------------------------------------------------------------------- signals


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, as torch does not while it waits for others:
    handlers of Python would only run when it returns. Nothing is held that has to be let go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Stop:
    """The signal that asked this process to end, 0 for none."""

    number = 0


@contextmanager
def signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the run behind the running batch; a second one ends it at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.number:
            raise KeyboardInterrupt
        stop.number = number
        with suppress(OSError):  # nobody reads it
            # no print: the signal may have come in the middle of one
            os.write(2, b"\nvtc: stopping behind this batch (again: at once)\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
