"""Settings for every test: property tests have no deadline of their own, and CI tries the same examples each time."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# A shared machine stalls for longer than the default 200 ms an example; pytest's own timeout catches what hangs.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")

# A shell that starts us in the background has SIGINT ignored, and children inherit that: tests that press Ctrl-C on a
# process would find it deaf.
signal.signal(signal.SIGINT, signal.default_int_handler)
