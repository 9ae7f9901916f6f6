"""A device worker: the process that has the CUDA context, for one GPU and one owner.

``python -m xferd.plugins.cuda.worker``, started by ``process.py``. What it does is ``loop.py``; here it is set up.

It ends when the socket does, when its parent dies, and when the driver says that the device is lost to it.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import os
import signal
import socket
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from xferd.api.errors import XferdError
from xferd.plugins.cuda import control
from xferd.plugins.cuda.files import FileMovers, look
from xferd.plugins.cuda.layout import SharedQueues
from xferd.plugins.cuda.loop import Loop

if TYPE_CHECKING:
    from xferd.plugins.cuda.driver import Driver

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_TIMERSLACK = 1, 15, 29


def main(argv: list[str]) -> int:
    """Be a worker, on fds that the parent has passed; returns the exit status."""
    options = _parse(argv)
    _settle(f"xferd-gpu{options.device}")
    # Low numbers, which select() wants; the parent may have had thousands of files open.
    fds = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (options.socket, options.memory, options.wake, options.told)
    ]
    for fd in (options.socket, options.memory, options.wake, options.told):
        os.close(fd)
    with socket.socket(fileno=fds[0]) as sock:
        sock.setblocking(True)
        queues = SharedQueues(fds[1])
        try:
            driver = _driver(options)
            ready = driver.start(options.device)
            library, refusal = look(options.driver) if options.files else (None, "the workers were not asked")
            ready = replace(ready, file_manner="" if library is None else library.manner, file_refusal=refusal)
        except XferdError as error:
            control.send(sock, control.Reply.of(error))
            return 1
        loop = Loop(driver, queues, sock, fds[2], fds[3], None if library is None else FileMovers(library))
        control.send(sock, ready)
        gc.collect()
        gc.freeze()
        gc.disable()  # the loop makes no cycles; what errors leave behind is collected when nothing is to be done
        return loop.run(int(options.spin * 1e9))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xferd.plugins.cuda.worker", description=__doc__)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--driver", choices=("cuda", "simulated"), required=True)
    parser.add_argument("--spin", type=float, required=True, help="seconds")
    for name in ("socket", "memory", "wake", "told"):
        parser.add_argument(f"--{name}", type=int, required=True, help="fd")
    parser.add_argument("--files", action="store_true", help="move between files and GPU memory too")
    parser.add_argument("--simulated-nbytes", type=int, default=1 << 30)
    parser.add_argument("--simulated-devices", type=int, default=1)
    return parser.parse_args(argv)


def _settle(name: str) -> None:
    """Die with the parent, let it handle the keyboard, have a name in ps, and wake up on time."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(_PR_SET_NAME, name.encode()[:15])
    prctl(_PR_SET_TIMERSLACK, 1000)  # ns; 50,000 otherwise, which is longer than the steps of a wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _driver(options: argparse.Namespace) -> Driver:
    if options.driver == "simulated":
        from xferd.plugins.cuda.faults import Faults
        from xferd.plugins.cuda.simulated import SimulatedDriver

        faults = Faults.from_environment(os.environ)
        return SimulatedDriver(options.simulated_nbytes, options.simulated_devices, faults)
    from xferd.plugins.cuda.nvidia import NvidiaDriver

    return NvidiaDriver()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    # Not by way of the interpreter's end: that would wait for threads and undo what the kernel undoes quicker.
    os._exit(status)
