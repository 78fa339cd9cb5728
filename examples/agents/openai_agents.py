"""An agent of the OpenAI Agents SDK (openai-agents) with one tool, which is asked for the weather.

It runs as a function, `rollout.agent=examples/agents/openai_agents.py:play`, or as a command,
`rollout.agent="python examples/agents/openai_agents.py"`. A row has a question, and in extra_info the `weather` of
each city and the `answer`.
"""

import json
import os
from pathlib import Path

from agents import Agent, AgentsException, Runner, function_tool


def play(task):
    """Return the reward of one episode: 1 for the right answer, else 0."""
    asked = []

    @function_tool
    def weather(city: str) -> str:
        """Return today's weather in a city."""
        asked.append(city)
        return task["extra_info"]["weather"].get(city, "unknown")

    agent = Agent(name="Forecaster", instructions="Answer with one word.", tools=[weather], model="policy")
    try:
        answer = Runner.run_sync(agent, task["prompt"], max_turns=4).final_output
    except AgentsException:  # too many turns, a response that was cut, a tool that does not exist
        answer = ""
    reward = float(answer.strip() == task["extra_info"]["answer"])
    return {"reward": reward, "metrics": {"calls": len(asked)}}


if __name__ == "__main__":
    episode = json.loads(Path(os.environ["RL2_TASK"]).read_text())
    Path("reward.json").write_text(json.dumps(play(episode)))
