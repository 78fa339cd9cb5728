"""A taskset of `verifiers` with a tool, whose server keeps a state with the episode."""

from __future__ import annotations

import verifiers.v1 as vf


class AddingState(vf.State):
    calls: int = 0


class AddingData(vf.TaskData):
    answer: str


class AddTools(vf.Toolset[vf.ToolsetConfig, AddingState]):
    TOOL_PREFIX = None

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Return the sum of two numbers."""
        self.state.calls += 1
        return str(a + b)


class AddingTask(vf.Task[AddingData, AddingState]):
    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [AddTools(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.metric
    async def calls(self, trace: vf.Trace) -> float:
        return float(trace.state.calls)


class AddingTaskset(vf.Taskset[AddingTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):  # type: ignore[no-untyped-def]
        number = 0
        while True:
            yield AddingTask(AddingData(prompt=f"{number}+{number}?", answer=str(2 * number)), self.config.task)
            number += 1


__all__ = ["AddingTaskset"]


if __name__ == "__main__":
    AddTools.run()
