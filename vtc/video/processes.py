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

#: the fastest process waits for the slowest, which may take days longer
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
    """The processes of `accelerate launch`, on one machine or several."""

    device: str | None

    def __init__(self) -> None:
        import torch
        from accelerate import PartialState

        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        on_cpu = on_cpu or not torch.accelerator.is_available()
        self.state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        self.rank, self.size = self.state.process_index, self.state.num_processes
        self.device = str(self.state.device)

    def share(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        try:
            self.state.wait_for_everyone()
        except RuntimeError as error:  # what a broken connection is to torch.distributed
            raise VtcError(
                "another process of this run ended early. Run the same command again; what is "
                "answered stays."
            ) from error


def started() -> Processes:
    """The processes of this run, as the launcher's environment tells."""
    sizes = (int(os.environ.get(name, 1)) for name in SIZES)
    return Launched() if max(sizes) > 1 else Alone()


# ---------------------------------------------------------------------- signals


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
