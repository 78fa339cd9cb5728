"""The user's script: loaded from its file, run concurrently with the engine, its results checked.

A script has `async def step(state, action, extra_info) -> dict` and optionally `async def reset(extra_info) -> str`,
`def example(row) -> dict`, `def vote(action) -> str` and `def hint(extra_info) -> str` (rollout/hints.py). A script
with several roles has `ROLES` and `async def play(ask, task) -> dict` in place of `step`. It imports nothing of this
library, but may import modules of its folder with `from .name import x`. A `step` or `reset` with a parameter
`sampling` gets the sampling parameters, and a `step` with a parameter `calls` the tool calls of the response.

Its code runs in one thread with an event loop of its own, so that it may share sessions between calls and may block
without stopping the engine. Python code that never returns is interrupted. C code that holds the interpreter lock, such
as a runaway regular expression, stops the whole process, and only the script can prevent that. After a blocked call
there is a new event loop: a script must open its sessions again when `asyncio.get_running_loop()` has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from RL2.config.scripts import ScriptError, described, load_script, raise_in
from RL2.data.call_formats import ToolCall
from RL2.rollout.game import Game, GameResult, Said, checked_roles
from RL2.rollout.step_result import State, StepResult, Unscored, checked, is_state, name_of
from RL2.types import Sampling

ATTEMPTS = 4
"""Attempts of a call before it is given up because other calls blocked the loop each time."""
PATIENCE = 1.25
"""Limits without progress after which a loop is taken for blocked. Above 1: a live loop stops a slow call itself."""
TIMEOUT_S = 60.0
"""Limit of a call of a script, in seconds, unless another is given."""
AsyncFunction = Callable[..., Coroutine[Any, Any, Any]]
Respond = Callable[[str, Said], Coroutine[Any, Any, str]]
"""Function that returns the response of a role to what is said to it."""
OnStep = Callable[[str, StepResult], object]
"""Function that is told each response and its result, to show them."""


def load_environment(
    path: str | Path,
    timeout_s: float = TIMEOUT_S,
    weights: Mapping[str, float] | None = None,
    on_step: OnStep | None = None,
    with_roles: bool = False,
) -> Environment:
    """Load the script at `path`; a call of it that takes longer than `timeout_s` is unscored. Raises `ScriptError`.

    `weights` are those of the parts of its reward; a part without one counts once. `on_step` is called with each
    response and its checked result. `with_roles` says that the caller can play scripts with several roles.
    """
    module = load_script(path)
    step = _function(module, path, "step", ("state", "action", "extra_info"), is_async=True)
    play = _function(module, path, "play", ("ask", "task"), is_async=True)
    if play is not None:
        return _with_roles(module, path, play, step, timeout_s, weights or {}, with_roles)
    if step is None:
        raise ScriptError(f"{path} has no `async def step(state, action, extra_info)`")
    reset = _function(module, path, "reset", ("extra_info",), is_async=True)
    example = _function(module, path, "example", ("row",), is_async=False)
    vote = _function(module, path, "vote", ("action",), is_async=False)
    hint = _function(module, path, "hint", ("extra_info",), is_async=False)
    where = str(path), module.__file__
    return Environment(*where, step, reset, example, vote, timeout_s, weights or {}, on_step, hint)


def _with_roles(
    module: ModuleType,
    path: str | Path,
    play: AsyncFunction,
    step: AsyncFunction | None,
    timeout_s: float,
    weights: Mapping[str, float],
    can_play: bool,
) -> Environment:
    """Return an environment of a script with several roles."""
    if not can_play:
        raise ScriptError(
            f"{path} has several roles, which only runs of reinforcement learning and rl2 play can play; to test a "
            "model, use rl2 train with trainer.eval_only=true and test_data.prompts_per_rollout or test_data.path"
        )
    if step is not None or hasattr(module, "reset"):
        raise ScriptError(f"{path} has play, so it has neither step nor reset; remove them, or remove play")
    try:
        roles = checked_roles(getattr(module, "ROLES", None))
    except ValueError as error:
        raise ScriptError(f"{path}: {error}") from error
    example = _function(module, path, "example", ("row",), is_async=False)

    async def no_step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        raise Unscored(f"{path} has several roles, and no step")

    return Environment(
        str(path), module.__file__, no_step, None, example, None, timeout_s, weights, play=play, roles=roles
    )


def environment_of(step: AsyncFunction, timeout_s: float = TIMEOUT_S) -> Environment:
    """Return an environment of the function `step` alone, as a script has it. Raise ScriptError if it is not one."""
    _function(SimpleNamespace(step=step), "environment", "step", ("state", "action", "extra_info"), is_async=True)
    file = step.__code__.co_filename if inspect.isfunction(step) else None
    return Environment(file or "step", file, step, None, None, None, timeout_s, {})


def without_script(weights: Mapping[str, float]) -> Environment:
    """Return an environment for agents that leave their rewards themselves; `weights` are those of reward parts."""

    async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        raise Unscored("the agent left no reward, and no rollout.env_path judges its answer")

    return Environment("rollout.agent", None, step, None, None, None, TIMEOUT_S, weights)


def without_rewards() -> Environment:
    """Return an environment for runs that learn from a teacher alone: a response is the end, and its reward is 0."""

    async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        return {"next_state": None, "reward": 0.0, "score": 0.0, "done": True, "extra_info": extra_info}

    return Environment("rollout.env_path", None, step, None, None, None, TIMEOUT_S, {})


def load_example(path: str | Path) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """Return `example` of the script at `path`, which needs nothing else. Raise ScriptError if it has none."""
    example = _function(load_script(path), path, "example", ("row",), is_async=False)
    if example is None:
        raise ScriptError(f"{path} has no `def example(row)`, by which rows would go through it")
    return example


class Environment:
    """The functions of a script, safe to call from the engine's event loop: a call ends, whatever the script does."""

    def __init__(
        self,
        path: str,
        file: str | None,
        step: AsyncFunction,
        reset: AsyncFunction | None,
        example: Callable[[dict[str, Any]], dict[str, Any] | None] | None,
        vote: Callable[[str], str] | None,
        timeout_s: float,
        weights: Mapping[str, float],
        on_step: OnStep | None = None,
        hint: Callable[..., Any] | None = None,
        play: AsyncFunction | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.file = path, file
        self.roles = dict(roles or {})
        """Role -> system prompt, '' for none; empty if the script has no `play`."""
        self.example = example
        """Turns a raw row of a data file into one of ours, or into None to leave it out; None if there is none."""
        self.vote = vote
        """Return the answer of a response, for majority votes; '' for none, None if the script has no such function."""
        self.timeout_s = timeout_s
        self.weights = weights
        """Weights of the parts of a reward."""
        self.wants_calls = _has_parameter(step, "calls")
        """True if `step` gets the tool calls of the response."""
        self._on_step = on_step
        self._hint = hint
        self._step = step
        self._reset = reset
        self._play = play
        self._thread: _LoopThread | None = None

    @property
    def has_hint(self) -> bool:
        return self._hint is not None

    def hint(self, extra_info: dict[str, Any], attempts: Sequence[dict[str, Any]]) -> Any:
        """Return what `hint` of the script says of a row; it gets the `attempts` if it has a parameter for them."""
        assert self._hint is not None, "ask has_hint first"
        told = {"attempts": attempts} if _has_parameter(self._hint, "attempts") else {}
        return self._hint(extra_info, **told)

    @property
    def has_reset(self) -> bool:
        return self._reset is not None

    async def reset(self, extra_info: dict[str, Any], sampling: Sampling | None = None) -> State:
        """Return the first state of an episode without a prompt. Raise Unscored if there is none."""
        assert self._reset is not None, "ask has_reset first"
        state = await self._call("reset", _told(self._reset, sampling), extra_info)
        if not is_state(state):
            raise Unscored(f"reset returned {name_of(state)}; expected a str or a list of messages")
        return state

    async def step(
        self,
        state: str,
        action: str,
        extra_info: dict[str, Any],
        sampling: Sampling | None = None,
        calls: Sequence[ToolCall] = (),
    ) -> StepResult:
        """Return what `step` of the script returned. Raise Unscored if it has no reward, which is not a reward of 0.

        `calls` are those in the response; a script that does not want them does not get them.
        """
        step = _told(self._step, sampling)
        if self.wants_calls:
            told = [{"name": call.name, "arguments": call.arguments, "error": call.error} for call in calls]
            step = partial(step, calls=told)
        result = await self._call("step", step, state, action, extra_info)
        found = checked(result, self.weights, len(action))
        if self._on_step is not None:
            self._on_step(action, found)
        return found

    async def play(self, respond: Respond, task: dict[str, Any]) -> GameResult:
        """Let the script play `task`, with the responses of `respond`. Raise Unscored if it has no result."""
        assert self._play is not None, "ask roles first"
        game = Game(self._play, self.roles)
        waiting: dict[asyncio.Task[str], int] = {}
        try:
            asked = await self._call("play", game.begin, task)
            while not game.is_over:
                waiting |= {asyncio.create_task(respond(each.role, each.said)): each.number for each in asked}
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                answered = [(waiting.pop(response), response.result()) for response in done]
                asked = [each for of in answered for each in await self._call("play", game.answer, *of)]
            result: GameResult = await self._call("play", game.result)
            return result
        finally:
            for response in waiting:
                response.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            if self._thread is not None:
                self._thread.do(game.cancel)

    def close(self) -> None:
        """Stop the script's thread. One that does not stop within a second is left to the end of the process."""
        if self._thread is not None:
            self._thread.stop()
            self._thread.join(timeout=1)
            self._thread.interrupt()
            self._thread = None

    async def _call(self, name: str, function: AsyncFunction, *args: Any) -> Any:
        for _ in range(ATTEMPTS):
            if self._thread is None or not self._thread.is_alive():
                self._thread = _LoopThread(self.timeout_s)
            thread = self._thread
            submitted = time.monotonic()
            call = thread.submit(function, args)
            answer = asyncio.wrap_future(call)
            try:
                while not call.done():  # not `answer`, which hears of it only when this loop has time
                    deadline = max(thread.progress, submitted) + PATIENCE * self.timeout_s
                    patience = deadline - time.monotonic()
                    if patience <= 0:
                        self._abandon(thread)
                        break
                    await asyncio.wait({answer}, timeout=patience)
            finally:
                thread.calls.pop(call, None)
                answer.cancel()
            if call.cancelled():
                continue  # never started, so not at fault
            value, error = call.result() if call.done() else (None, _Overtime())
            if isinstance(error, _Overtime):
                raise Unscored(f"{name} took longer than rollout.env_timeout_s={self.timeout_s:g}")
            if isinstance(error, Unscored):
                raise error
            if error is not None:
                raise Unscored(described(error, self.path, self.file)) from error
            return value
        raise Unscored(f"{ATTEMPTS} times, other calls blocked longer than rollout.env_timeout_s={self.timeout_s:g}")

    def _abandon(self, thread: _LoopThread) -> None:
        """Leave a blocked thread behind; whichever caller notices first does it for all."""
        if self._thread is thread:
            self._thread = None
            thread.stop()
            thread.interrupt()


class _Overtime(Exception):
    """An error: a call ran past its limit."""


class _LoopThread(threading.Thread):
    """An event loop in a thread, with a note of when a call last started or ended.

    If that is longer ago than the limit, each call that has started is past its own limit, and each that has not is
    innocent: nobody has to find out who blocks.
    """

    def __init__(self, limit_s: float) -> None:
        super().__init__(name="environment", daemon=True)
        self.limit_s = limit_s
        self.progress = time.monotonic()
        self.calls: dict[Future[Any], None] = {}
        """Handed in and not yet answered, in that order; touched by the callers' side only."""
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # a loop itself holds its tasks only weakly
        self.start()

    def submit(self, function: AsyncFunction, args: tuple[Any, ...]) -> Future[Any]:
        """Hand in a call, whose result is (value, None) or (None, error). Cancelled: the function is never called."""
        call: Future[Any] = Future()
        try:
            self._loop.call_soon_threadsafe(self._launch, call, function, args)
            self.calls[call] = None
        except RuntimeError:  # the loop has just been closed
            call.cancel()
        return call

    def do(self, function: Callable[[], object]) -> None:
        """Call `function` in the loop, unless it has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Stop the loop: calls that have not started never will, and the thread ends after its current callback."""
        for call in self.calls:
            call.cancel()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)

    def interrupt(self) -> None:
        """Raise SystemExit in the Python code that runs there: an endless loop would slow down the process for ever."""
        if self.is_alive() and self.ident is not None:
            raise_in(self.ident, SystemExit)

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            with contextlib.suppress(SystemExit):  # an interrupt, or the script's own
                self._loop.run_forever()
            with contextlib.suppress(SystemExit, RuntimeError):  # an interrupt or a stop that comes only now
                left = asyncio.all_tasks(self._loop)
                for task in left:
                    task.cancel()
                if left:  # their `finally` blocks run
                    self._loop.run_until_complete(asyncio.wait(left, timeout=self.limit_s))
        finally:
            self._loop.close()

    def _launch(self, call: Future[Any], function: AsyncFunction, args: tuple[Any, ...]) -> None:
        task = self._loop.create_task(self._serve(call, function, args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, call: Future[Any], function: AsyncFunction, args: tuple[Any, ...]) -> None:
        if not call.set_running_or_notify_cancel():  # from here on it cannot be cancelled: it has started
            return
        start = self.progress = time.monotonic()
        task = asyncio.current_task()
        assert task is not None
        timer = self._loop.call_later(self.limit_s, self._expire, call, task)
        value: Any = None
        error: BaseException | None = None
        try:
            value = await function(*args)
        except BaseException as raised:  # SystemExit too: it ends this call, not the thread
            error = raised
        timer.cancel()
        self.progress = time.monotonic()
        if not call.done():
            call.set_result((value, error) if self.progress - start <= self.limit_s else (None, _Overtime()))

    def _expire(self, call: Future[Any], task: asyncio.Task[Any]) -> None:
        call.set_result((None, _Overtime()))  # at once: the task may take its time to be cancelled
        task.cancel()


def _function(
    module: ModuleType | SimpleNamespace, path: str | Path, name: str, parameters: tuple[str, ...], *, is_async: bool
) -> Any:
    function = getattr(module, name, None)
    if function is None:
        return None
    wanted = f"{'async ' * is_async}def {name}({', '.join(parameters)})"
    if not callable(function) or inspect.iscoroutinefunction(function) != is_async:
        raise ScriptError(f"{path}: {name} must be `{wanted}`")
    try:
        names = {"step": ("sampling", "calls"), "reset": ("sampling",), "hint": ("attempts",)}.get(name, ())
        told = {each: None for each in names if _has_parameter(function, each)}
        inspect.signature(function).bind(*parameters, **told)
    except (TypeError, ValueError) as error:
        raise ScriptError(f"{path}: {name} must be `{wanted}`: {error}") from error
    return function


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _told(function: AsyncFunction, sampling: Sampling | None) -> AsyncFunction:
    """Return `function` with the sampling arguments bound, as a dict, if it has a parameter for them."""
    if sampling is None or not _has_parameter(function, "sampling"):
        return function
    return partial(function, sampling=asdict(sampling))
