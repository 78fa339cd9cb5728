"""An objective, an advantage, an environment and a filter of one's own, each in a file outside the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import World

OBJECTIVE = '''
from RL2.objectives.objective import needs


@needs("logp")
def weighted(stats, batch, *, power: float = 1.0):
    """REINFORCE, which reports the advantages that it sees."""
    return -(batch.advantage_T * power) * stats.logp, {"seen": batch.advantage_T}
'''
ADVANTAGE = '''
from RL2.batch.advantages import by_trajectory, on_actions
from RL2.batch.estimator import reads


@reads("rewards")
def shifted(batch, *, by: float = 1.0):
    """The reward plus a constant."""
    reward_N, _, number_B = by_trajectory(batch)
    return on_actions(batch, (reward_N + by)[number_B])
'''
ENVIRONMENT = '''
async def step(state, action, extra_info):
    """One group of four earns 2 a response, the others 1."""
    reward = 2.0 if extra_info["row"] % 4 == 0 else 1.0
    return dict(next_state=None, reward=reward, score=reward, done=True, extra_info=extra_info)
'''
FILTER = '''
def rich(groups):
    """Keep the groups that earn 2."""
    return [group for group in groups if group[0].reward > 1.5]
'''


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    files = {"objective": OBJECTIVE, "advantage": ADVANTAGE, "environment": ENVIRONMENT, "filter": FILTER}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    return {name: tmp_path / f"{name}.py" for name in files}


def test_all_four_train_together(world: World, parts: dict[str, Path]) -> None:
    """The rewards come from the environment, what trains from the filter, the rest from advantage and objective."""
    run = world.run(
        "ppo",
        f"actor.objective={parts['objective']}:weighted",
        "actor.objective_args.power=0.5",
        f"adv.estimator={parts['advantage']}:shifted",
        "adv.args.by=3",
        f"rollout.env_path={parts['environment']}",
        f"rollout.filter={parts['filter']}:rich",
        "train_data.prompts_per_rollout=24",
        "train_data.responses_per_prompt=1",
        "trainer.max_steps=1",
    ).succeeded()
    (step,) = run.metrics
    assert step["train/reward"] == pytest.approx(1.25)  # 6 of the 24 rows earn 2
    assert step["train/filtered"] == pytest.approx(0.75)
    assert step["actor/seen"] == pytest.approx(5)  # 2 + 3, of what the filter kept
    assert run.weights.read_bytes() != world.weights.read_bytes()


CRITIC = """
from RL2.batch.advantages import gae
from RL2.batch.estimator import reads


@reads("rewards", "values")
def mine(batch, *, lamda: float = 1.0, discount: float = 1.0):
    return gae(batch, gamma=discount, lamda=lamda)
"""


def test_an_advantage_that_reads_values_gets_a_critic(world: World, tmp_path: Path) -> None:
    """It trains to the last bit as `gae` does, whitening included."""
    (tmp_path / "mine.py").write_text(CRITIC)
    settings = ("adv.lamda=0.9", "adv.global_norm=true", "adv.norm_var=true", "critic.lr=1e-3", "trainer.max_steps=2")
    ours = world.run("ppo", "adv.estimator=gae", "adv.gamma=0.8", *settings).succeeded()
    own = world.run("ppo", f"adv.estimator={tmp_path}/mine.py:mine", "adv.args.discount=0.8", *settings).succeeded()
    assert own.weights.read_bytes() == ours.weights.read_bytes()
    assert own.metrics[0]["critic/loss"] == ours.metrics[0]["critic/loss"]


MISTAKES = [
    ("adv.estimator={advantage}:other", "ppo: adv.estimator={advantage}:other: {advantage} has no function other"),
    (
        "adv.estimator={filter}:rich",
        "ppo: adv.estimator={filter}:rich: say what it reads, @reads('rewards', ...) of RL2.batch.estimator",
    ),
    ("rollout.filter={filter}:poor", "ppo: rollout.filter={filter}:poor: {filter} has no function poor"),
    ("rollout.filter=rich", "ppo: rollout.filter=rich; expected path.py:function"),
    (
        "adv.estimator={advantage}:shifted adv.args.how=1",
        "ppo: adv.args.how has no effect: adv.estimator={advantage}:shifted does not read it; its knobs are by",
    ),
    ("adv.args.lamda=1", "ppo: adv.args.lamda has a key of its own; set adv.lamda"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[settings for settings, _ in MISTAKES])
def test_a_part_that_cannot_be_used_ends_the_program_in_one_line(
    settings: str, message: str, world: World, parts: dict[str, Path]
) -> None:
    run = world.run("ppo", *settings.format(**parts).split())
    assert run.process.returncode == 1
    assert run.errors == message.format(**parts) + "\n"


BAD_FILTERS = {
    "def bad(groups):\n    return groups[0] / 2\n": r" raises TypeError: .* (FILE:2); it gets a list of groups",
    "from copy import deepcopy as bad\n": " returns a trajectory that it was not given; return trajectories of its",
}


@pytest.mark.parametrize("text", BAD_FILTERS)
def test_a_filter_that_fails_ends_the_run_in_one_line(text: str, world: World, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    run = world.run("ppo", f"rollout.filter={file}:bad", "trainer.max_steps=1")
    assert run.process.returncode == 1
    (line,) = run.errors.splitlines()
    begin, _, end = BAD_FILTERS[text].partition(" .* ")
    assert line.startswith(f"ppo: rollout.filter={file}:bad{begin}")
    assert end.replace("FILE", str(file)) in line
