"""What a process refuses before it looks for the others. Their collectives are tested by tests/invariants."""

import pytest

from RL2.errors import ConfigError
from RL2.parallel.processes import Processes


def test_restarts_on_several_nodes_need_a_store_for_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun counts restarts on each node for itself, so no count could tell the starts in a shared store apart."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        Processes.start(timeout_s=1)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in (("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^4 processes on a machine with 2 GPU\(s\), .*; lower --nproc"):
        Processes.start(timeout_s=1)
