"""``python -m xferd.clients.bench`` is ``xferbench``."""

import sys

from xferd.clients.bench import main

sys.exit(main())
