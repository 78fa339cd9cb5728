"""PPO with a critic against TRL's PPOTrainer, in a process with the last TRL that has one.

TRL took its PPO out after 1.12. Everything else is compared with a newer one, so `make setup` puts that version into a
folder of its own, which comes first there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OLDER_TRL = Path(sys.prefix) / "trl-1.12"
COMPARISON = Path(__file__).with_name("trl_ppo.py")


def test_ppo_is_that_of_trl() -> None:
    assert OLDER_TRL.is_dir(), f"make setup, or: pip install --no-deps --target {OLDER_TRL} trl==1.12.0"
    path = os.pathsep.join(filter(None, [str(OLDER_TRL), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(COMPARISON)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
