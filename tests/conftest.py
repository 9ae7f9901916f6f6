"""Settings for every test: property tests have no deadline of their own, and CI tries the same examples each time."""

from __future__ import annotations

import os

from hypothesis import settings

# A shared machine stalls for longer than the default 200 ms an example; pytest's own timeout catches what hangs.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")
