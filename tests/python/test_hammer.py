"""The hammer of `make stress`, in short."""

import subprocess
import sys
from pathlib import Path

import pytest

HAMMER = Path(__file__).parents[1] / "stress" / "hammer.py"


@pytest.mark.timeout(300)
def test_three_seconds_of_every_operation_leave_nothing_behind():
    command = [sys.executable, str(HAMMER), "--seconds", "3"]
    hammer = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert hammer.returncode == 0, hammer.stdout + hammer.stderr
    assert "all as it should be" in hammer.stdout
