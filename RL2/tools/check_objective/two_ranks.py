"""Two processes that evaluate an objective together, as in training: each takes some of the sequences."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from RL2.objectives.objective import Objective
from RL2.tools.check_objective.subject import Subject
from RL2.tools.checking import Setting

TIMEOUT_S = 30.0
DIED = "one of the two processes died"


class PairError(Exception):
    """A failure of one process of the pair; the message is its own."""


class Pair:
    """A gloo group of two processes that evaluates any number of objectives; for use in a `with` block."""

    def __enter__(self) -> Pair:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, Path(self.folder.name) / "store", there), daemon=True)
            process.start()
            there.close()  # otherwise the death of the process is not seen here
            self.pipes.append(here)
            self.processes.append(process)
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self.processes:
            process.terminate()
            process.join()
        self.folder.cleanup()

    def sums(self, subject: Subject) -> list[dict[str, Tensor]]:
        """Return `Subject.sums` of the synthetic batch at each setting, summed over the two processes.

        Raise PairError if a process fails; both are then started again.
        """
        try:
            return self._ask(subject.source, tuple(subject.read), subject.settings, subject.vocabulary)
        except PairError:
            self.__exit__()
            self.__enter__()
            raise

    def _ask(self, *job: Any) -> Any:
        """Return the answer to a job, which is the same from both processes.

        Raise PairError at the first failure, without waiting for the other process, which may hang because of it.
        """
        try:
            for pipe in self.pipes:
                pipe.send(job)
        except (PicklingError, AttributeError, TypeError) as error:
            raise PairError("another process cannot import it; define it at the top of a module") from error
        except OSError as error:
            raise PairError(DIED) from error
        waiting: list[Any] = list(self.pipes)
        answer = None
        while waiting:
            ready = wait(waiting, 2 * TIMEOUT_S)
            if not ready:
                raise PairError(f"no answer after {2 * TIMEOUT_S:.0f} seconds")
            for pipe in ready:
                answer = _receive(pipe)
                waiting.remove(pipe)
        return answer


def _receive(pipe: Any) -> Any:
    try:
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        raise PairError(DIED) from error
    if isinstance(answer, str):
        raise PairError(answer)
    return answer


def _serve(rank: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S)
    )
    while True:
        try:
            pipe.send(_work(rank, *pipe.recv()))
        except EOFError:  # the other end is closed
            return
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _work(
    rank: int, source: str | Objective, read: tuple[str, ...], settings: list[Setting], vocabulary: int
) -> list[dict[str, Tensor]]:
    subject = Subject(source, {})
    subject.read.update(read)
    whole = subject.whole(vocabulary)
    own = whole.sequences([b for unit in whole.units(subject.function.trains_on)[rank::2] for b in unit])
    sums = [subject.sums(setting, own) for setting in settings]
    for x in [x for of_setting in sums for x in of_setting.values()]:
        dist.all_reduce(x)
    return sums
