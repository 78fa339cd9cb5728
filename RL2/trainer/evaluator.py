"""Tests within a run: every test set with the current weights, and the scores so far."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from statistics import fmean

from RL2.config.programs import RLConfig
from RL2.io.progress import time_of_day
from RL2.io.report import Metrics, Report
from RL2.rollout.episodes import Episodes
from RL2.rollout.metrics import raise_if_all_unscored, rollout_metrics
from RL2.rollout.roles import by_role
from RL2.trainer.announce import describe_test
from RL2.trainer.early_stopping import Scores
from RL2.trainer.tasks import TestTasks
from RL2.trainer.token_log import TokenLog
from RL2.types import Trajectory


class Evaluator:
    """Tests of the current weights; they decide which are the best, and when a run stops early."""

    def __init__(
        self, config: RLConfig, tests: list[TestTasks], episodes: Episodes, report: Report, token_log: TokenLog
    ) -> None:
        self.config, self.tests, self.episodes = config, tests, episodes
        self.report, self.token_log = report, token_log
        before = episodes.processes.gather(scores_of(report.rows(), tests, config), "the scores so far")
        self.scores = Scores(before)
        self.has_run = False

    def run(self, step: int) -> Metrics:
        """Return metrics of the current weights on every test set, among them `test/score` (collective).

        Seeds are the same at every step: only the weights differ. Raises NothingScored if a set has no reward at all.
        """
        if not self.has_run:
            self.report.say(*map(describe_test, self.tests))
        metrics: Metrics = {}
        before = 0
        for each in self.tests:
            settings = each.settings
            trajectories = self._play(each, step, before)
            raise_if_all_unscored(trajectories, f" of {settings.key}" if settings.name else "")
            warn_of_metrics(trajectories, step, self.report)
            metrics |= rollout_metrics(trajectories, settings.prefix)
            before += len(each.prompts)
            shown = by_role(trajectories[: self.config.trainer.samples_per_step])
            self.report.samples(step, "test", shown, settings.name)
            self.token_log.tests.append((shown, settings.sampling))
        metrics["test/score"] = fmean(scores_of([metrics], self.tests, self.config))
        if not self.has_run:
            self.report.say(f"first test: score {metrics['test/score']:.3f}, at {time_of_day()}")
        self.has_run = True
        self.scores.add(metrics["test/score"])
        return metrics

    @property
    def newest_is_best(self) -> bool:
        return self.scores.newest_is_best

    @property
    def ends_run(self) -> bool:
        """Return whether `trainer.early_stop` ends the run: the score fell in two tests in a row."""
        return self.config.trainer.early_stop and self.scores.fell_twice

    def _play(self, each: TestTasks, step: int, before: int) -> list[Trajectory]:
        """Return the trajectories of one test set; their groups are numbered from `before`."""
        settings, prompts = each.settings, each.prompts
        wave = settings.prompts_per_rollout or len(prompts)
        setting = replace(
            self.episodes.setting,
            environment=each.environment,
            max_turns=settings.max_turns,
            player=each.player,
        )
        trajectories: list[Trajectory] = []
        what = f"test {settings.name} before step {step}" if settings.name else f"test before step {step}"
        with self.report.progress.phase(what, each.num_responses, "responses") as phase:
            for start in range(0, len(prompts), wave):
                of_wave = self.episodes.play(
                    prompts[start : start + wave],
                    settings.sampling,
                    settings.responses_per_prompt,
                    self.config.trainer.seed + start,
                    phase.update,
                    setting,
                )
                trajectories += [replace(trajectory, group=before + start + trajectory.group) for trajectory in of_wave]
        return trajectories


def scores_of(rows: Iterable[Metrics], tests: list[TestTasks], config: RLConfig) -> list[float]:
    """Return `test/score` of each test in `rows`, as the current settings define it.

    Rows without a test, and those of a run whose settings were others and that lack a set, are left out.
    """
    names = [f"{each.settings.prefix}/score" for each in decisive(tests, config)]
    return [fmean(row[name] for name in names) for row in rows if names and all(name in row for name in names)]


def decisive(tests: list[TestTasks], config: RLConfig) -> list[TestTasks]:
    """Return the sets whose mean score is `test/score`: `test_data` itself, else the one that is named, else all."""
    if config.test_data.has_own:
        return tests[:1]
    return [each for each in tests if config.test_data.best_by in (None, each.settings.name)]


def warn_of_turns(trajectories: Seq[Trajectory], max_turns: int, step: int, report: Report) -> None:
    """Say, once in a run, that episodes ended before the environment was done."""
    if number := sum(each.unfinished for each in trajectories):
        report.say_once(
            "turns",
            f"step {step}: {number} of {len(trajectories)} episodes ended after rollout.max_turns={max_turns} "
            "responses, before the environment was done",
        )


def warn_of_metrics(trajectories: Iterable[Trajectory], step: int, report: Report) -> None:
    """Name each metric of the environment that is no number, once in a run."""
    for trajectory in trajectories:
        for name, why in trajectory.left_out.items():
            report.say_once(f"metric {name}", f"step {step}: WARNING: a metric of the environment is left out: {why}")
