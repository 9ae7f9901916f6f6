"""An engine in a process of its own, for tests that kill it: it registers memory of a GPU and has it moved.

Arguments: session socket, agent, library, bytes. It prints its handle and device in hex, then waits for its end.
"""

from __future__ import annotations

import sys

from gpu_memory import LIBRARIES

from xferd.api.types import Access
from xferd.clients import Client, _device_regions as device_regions


def main() -> None:
    socket, agent, library, nbytes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    memory = LIBRARIES[library]()
    array = memory.make(nbytes)
    wanted = device_regions.wanted(array, Access.NONE, "", None)
    handle = wanted.driver.export(wanted.allocation).handle
    if socket:
        client = Client.connect(socket, agent)
        region = client.register_device(array, access=Access.READ_WRITE, label="engine")
        host = client.allocate(4096, "host")
        client.read(host, region.rows(0, 4096))  # so that the worker has really mapped it
    sys.stdout.write(f"{handle.hex()} {wanted.allocation.device_uuid.hex()} {wanted.allocation.nbytes}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
