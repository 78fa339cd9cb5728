"""A graph of LangGraph with a model and one tool, which is asked for the weather.

It runs as a function, `rollout.agent=examples/agents/langgraph_loop.py:play`, or as a command,
`rollout.agent="python examples/agents/langgraph_loop.py"`. A row has a question, and in extra_info the `weather` of
each city and the `answer`.
"""

import json
import os
from pathlib import Path

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


def play(task):
    """Return the reward of one episode: 1 for the right answer, else 0."""
    asked = []

    @tool
    def weather(city: str) -> str:
        """Return today's weather in a city."""
        asked.append(city)
        return task["extra_info"]["weather"].get(city, "unknown")

    model = ChatOpenAI(model="policy").bind_tools([weather])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([weather]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")

    messages = [("system", "Answer with one word."), ("user", task["prompt"])]
    try:
        answer = graph.compile().invoke({"messages": messages}, {"recursion_limit": 8})["messages"][-1].text
    except GraphRecursionError:  # it called the tool again and again
        answer = ""
    reward = float(answer.strip() == task["extra_info"]["answer"])
    return {"reward": reward, "metrics": {"calls": len(asked)}}


if __name__ == "__main__":
    episode = json.loads(Path(os.environ["RL2_TASK"]).read_text())
    Path("reward.json").write_text(json.dumps(play(episode)))
