"""What SGLang's client asks for, and what it makes of answers that are not what they should be."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from RL2.config.here import check_here
from RL2.config.load import load
from RL2.engines.served.client import Answer, Refused, ServerError
from RL2.engines.sglang.client import SGLangClient, request
from RL2.engines.sglang.server_spec import SGLANG_SERVER, server_arguments
from RL2.errors import ConfigError
from RL2.types import Sampling

PIECE: dict[str, Any] = {
    "text": "",
    "output_ids": [7, 8],
    "meta_info": {
        "id": "c3f0",
        "finish_reason": {"type": "length", "length": 2},
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "weight_version": "4",
        "weight_versions": [{"version": "default", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        "input_token_logprobs": [],
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
    },
}


def answer(sampling: Sampling, *pieces: dict[str, Any]) -> tuple[Answer, list[dict[str, Any]]]:
    """What the client makes of a server that gives `pieces` one after the other, and what it has asked for."""
    asked: list[dict[str, Any]] = []

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json=pieces[len(asked) - 1])

    async def generate() -> Answer:
        async with httpx.AsyncClient(transport=httpx.MockTransport(serve)) as http:
            return await SGLangClient("http://server", "token").generate(http, [5, 6], sampling, 1)

    return asyncio.run(generate()), asked


def piece(**changes: object) -> dict[str, Any]:
    changed = deepcopy(PIECE)
    changed["meta_info"] |= changes
    return changed


def test_an_answer_has_tokens_log_probabilities_and_versions() -> None:
    got, (body,) = answer(Sampling(max_new_tokens=2, temperature=0.7, seed=2**63 + 9), PIECE)
    assert got == Answer([7, 8], [-0.5, -1.5], "length", [-1, 4])
    assert body == {
        "input_ids": [5, 6],
        "sampling_params": {
            "max_new_tokens": 2,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": -1,
            "stop": [],
            "stop_token_ids": [],
            "ignore_eos": True,
            "sampling_seed": 9,
        },
        "return_logprob": True,
        "return_sampling_mask": False,
    }


def test_a_response_goes_on_where_a_token_ended_it_that_was_not_named() -> None:
    ended = piece(finish_reason={"type": "stop", "matched": 8})
    last = piece(finish_reason={"type": "stop", "matched": 9})
    last["output_ids"] = [7, 9]
    last["meta_info"]["output_token_logprobs"] = [[-0.1, 7, None], [-0.2, 9, None]]
    got, (first, second) = answer(Sampling(max_new_tokens=5, stop_token_ids=(9,), seed=3), ended, last)
    assert got == Answer([7, 8, 7, 9], [-0.5, -1.5, -0.1, -0.2], "stop", [-1, 4, -1, 4])
    assert not first["sampling_params"]["ignore_eos"]  # or 9 would not end it either
    assert second["input_ids"] == [5, 6, 7, 8]
    assert second["sampling_params"] == first["sampling_params"] | {"max_new_tokens": 3}
    # where nothing is left to ask for, that is its end
    got, asked = answer(Sampling(max_new_tokens=2, stop_token_ids=(9,)), ended)
    assert (got.finish, len(asked)) == ("length", 1)


def test_log_probabilities_of_a_cut_distribution_come_from_its_mask() -> None:
    sampling = Sampling(max_new_tokens=2, top_k=20, top_p=0.9)
    got, (body,) = answer(sampling, piece(output_token_sampling_logprobs=[-0.25, 0.0]))
    assert got.logps == [-0.25, 0.0]
    assert (body["sampling_params"]["top_k"], body["return_sampling_mask"]) == (20, True)
    for top_k, top_p in ((0, 0.9), (4097, 1.0)):
        with pytest.raises(ValueError, match="only with top_k=1 to 4096"):
            request([5], Sampling(max_new_tokens=2, top_k=top_k, top_p=top_p))
    # the most likely token is not drawn: nothing is cut
    assert not request([5], Sampling(max_new_tokens=2, temperature=0.0, top_p=0.9))["return_sampling_mask"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_token_logprobs": [[-0.5, 7, None]]}, "2 tokens came with 1 log-probabilities"),
        ({"output_token_logprobs": [[-0.5, 7, None], [-0.5, 9, None]]}, "not of the same tokens"),
        ({"output_token_logprobs": [[-0.5, 7, None], [None, 8, None]]}, "lacks a log-probability of each"),
        ({"weight_versions": [{"version": "4", "start": 0, "end": 1}]}, "2 tokens came with versions of 1"),
        ({"finish_reason": {"type": "stop", "matched": "NaN happened"}}, "a response ended with 'NaN happened'"),
    ],
)
def test_an_answer_that_lacks_something_is_no_answer(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ServerError, match=said):
        answer(Sampling(max_new_tokens=2), piece(**changes))


def test_a_server_that_says_no_versions_is_too_old() -> None:
    old = piece()
    del old["meta_info"]["weight_versions"]
    with pytest.raises(ServerError, match="too old"):
        answer(Sampling(max_new_tokens=2), old)


def test_a_context_that_is_too_short_is_said() -> None:
    with pytest.raises(Refused, match="after 2 of 3 tokens: raise --context-length"):
        answer(Sampling(max_new_tokens=3), PIECE)


RL = (
    "train_data.path=rows.jsonl",
    "train_data.prompts_per_rollout=4",
    "rollout.train_sampling_params.max_new_tokens=16",
    f"rollout.env_path={__file__}",
    "actor.model_name=model",
    "actor.max_length_per_device=512",
    "trainer.experiment_name=test",
    "rollout.engine=sglang",
)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.engine=vllm", "rollout.sglang.urls=[http://x]"], "rollout.sglang.urls, args and env have no effect"),
        (["rollout.vllm.env.A=1"], "rollout.vllm.urls, args and env have no effect with rollout.engine=sglang"),
        (["rollout.sglang.router_url=http://x"], "router_url needs rollout.sglang.urls"),
        (
            ["rollout.train_sampling_params.top_p=0.9"],
            "train_sampling_params has top_k=0 and top_p=0.9, with which SGLang does not return",
        ),
        (["rollout.sglang.python=/no/python"], r"rollout.sglang.python=/no/python: there is no such interpreter$"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_here(load("spo", [*RL, *overrides]))


def test_a_launched_server_reads_seeds_and_has_room_for_the_longest_sequence() -> None:
    rollout = load("spo", [*RL, "rollout.sglang.args=[--tp-size,'2']", "rollout.max_running_requests=7"]).rollout
    arguments = server_arguments(rollout, torch.bfloat16, 512)
    assert "--enable-deterministic-inference" in arguments and arguments[-2:] == ["--tp-size", "2"]
    pairs = dict(itertools.pairwise(arguments))
    assert pairs["--context-length"] == "520" and pairs["--dtype"] == "bfloat16"
    assert pairs["--max-running-requests"] == "7" and pairs["--model-path"] == "model"


def test_a_token_may_begin_with_a_dash(tmp_path: Path) -> None:
    """As one in 64 of those that are drawn does."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    script = (
        "import argparse; p = argparse.ArgumentParser(); p.add_argument('--api-key'); print(p.parse_args().api_key)"
    )
    (tmp_path / "sglang" / "launch_server.py").write_text(script)
    environment = {"SGLANG_API_KEY": "-token", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(SGLANG_SERVER.launcher)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "-token\n", done.stderr
