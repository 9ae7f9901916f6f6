"""Kill -9 during writes, 200 times; see ``storage_hammer.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_200_kills_every_extent_told_done_is_whole(tmp_path):
    hammer = Path(__file__).with_name("storage_hammer.py")
    pool = tmp_path / "pool"
    pool.mkdir()
    ran = subprocess.run(
        [sys.executable, str(hammer), str(pool), "200", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(hammer.parent)},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kills, done, compactions = map(int, re.findall(r"\d+", ran.stdout))
    assert kills == 200
    assert done > 400
    assert compactions > 10
