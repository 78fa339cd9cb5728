"""A ToolCallingAgent of smolagents with one tool, which is asked for the weather.

It runs as a function, `rollout.agent=examples/agents/smolagents_weather.py:play`, or as a command,
`rollout.agent="python examples/agents/smolagents_weather.py"`. A row has a question, and in extra_info the `weather` of
each city and the `answer`.
"""

import json
import os
from pathlib import Path

from smolagents import LogLevel, OpenAIModel, ToolCallingAgent, tool


def play(task):
    """Return the reward of one episode: 1 for the right answer, else 0."""
    asked = []

    @tool
    def weather(city: str) -> str:
        """Return today's weather in a city.

        Args:
            city: Name of the city.
        """
        asked.append(city)
        return task["extra_info"]["weather"].get(city, "unknown")

    agent = ToolCallingAgent([weather], OpenAIModel("policy"), max_steps=3, verbosity_level=LogLevel.OFF)
    # its own prompt, of 2,000 words, is for larger models
    agent.prompt_templates["system_prompt"] = "Answer with one word, by final_answer."
    answer = agent.run(task["prompt"])
    reward = float(str(answer).strip() == task["extra_info"]["answer"])
    return {"reward": reward, "metrics": {"calls": len(asked)}}


if __name__ == "__main__":
    episode = json.loads(Path(os.environ["RL2_TASK"]).read_text())
    Path("reward.json").write_text(json.dumps(play(episode)))
