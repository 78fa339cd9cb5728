"""Measured credit on the page of `rl2 view`: hover, side by side, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from books import HOSTILE, write_credit, write_run
from playwright.sync_api import Page, expect

from RL2.tools.view.page import write_page
from RL2.tools.view.run_index import RunIndex

pytestmark = pytest.mark.browser
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("credited")
    write_run(root / "spo", seed=0, objective="spo")
    write_credit(root / "spo", 2)
    write_page(RunIndex([str(root / "spo")]), root / "view.html")
    return root / "view.html"


@pytest.fixture
def rollout(page: Page, file: Path) -> Page:
    """The rollout of row 1 at step 2, which has a reward and four tokens."""
    page.goto(f"{file.as_uri()}#view=rollouts")
    page.get_by_label("Split").select_option("train")
    page.get_by_label("Step", exact=True).select_option("step 2")
    page.locator(".row").nth(1).click()
    return page


def test_hover_has_the_interval_of_the_token_and_of_its_alternative(rollout: Page) -> None:
    rollout.locator(".pane .said").nth(0).hover()
    tip = rollout.get_by_role("tooltip")
    other = MINUS.join(("", "0.20 (", "0.30 to ", "0.10)"))
    expect(tip.locator("dd.range")).to_have_text(["+0.25 (+0.05 to +0.45)", other])
    rollout.locator(".pane .said").nth(1).hover()
    expect(tip.locator("dd.range")).to_have_text([f"0.00 ({MINUS}0.05 to +0.05)"])
    assert rollout.evaluate("window.owned") is None


def test_colours_by_advantage_and_by_pull(rollout: Page) -> None:
    alpha = "(spans) => spans.map((span) => Number(getComputedStyle(span).backgroundColor.match(/[\\d.]+/g)[3] ?? 1))"
    said = rollout.locator(".pane .said")
    for statistic in ("measured advantage", "pull on the logit by spo"):
        rollout.get_by_label("Statistic").select_option(statistic)
        assert said.evaluate_all(alpha) == pytest.approx([0.62, 0, 0, 0], abs=0.005)
    rollout.get_by_role("group", name="Pulls").get_by_role("button", name="sft").click()
    expect(rollout.get_by_label("Statistic")).to_have_value("pull:sft")
    assert said.evaluate_all(alpha) == pytest.approx([0.62] * 4, abs=0.005)


def test_the_alternative_is_beside_the_answer(rollout: Page) -> None:
    other = rollout.get_by_role("region", name="Alternative")
    columns = other.locator("> div")
    expect(columns.nth(0)).to_contain_text("token 1, as sampled")  # the decisive token, before any is chosen
    expect(columns.nth(1).locator("pre")).to_have_text(f"{HOSTILE} instead {HOSTILE}", use_inner_text=False)
    expect(columns.nth(1)).to_contain_text("from 40 continuations; reward of this one 0")
    left, right = (columns.nth(n).bounding_box() for n in (0, 1))
    assert left is not None
    assert right is not None
    assert left["x"] + left["width"] <= right["x"]
    rollout.locator(".pane .said").nth(2).click()
    expect(columns.nth(0)).to_contain_text("token 3, as sampled")
    expect(columns.nth(1)).to_contain_text("not sampled here")


def test_the_value_curve(rollout: Page) -> None:
    figure = rollout.get_by_role("img", name="Value along the answer")
    assert (
        figure.locator("polyline").get_attribute("points") == "0,0.5000 1,0.2500 2,0.2500 3,0.2500 4,0.0000"
    )  # from the top
    expect(rollout.locator(".value .hint")).to_contain_text("500 continuations")


def test_the_table_of_agreement(page: Page, file: Path) -> None:
    page.goto(file.as_uri())
    rows = page.locator("#credits tbody tr")
    expect(rows.locator("th")).to_have_text(["spo", "sft"])  # by the rank correlation of the sizes
    expect(rows.nth(0).locator("td")).to_have_text(["0.9 0.8 to 1", "0.5 0.4 to 0.6", "", ""])
    expect(page.locator("#credits .hint")).to_contain_text("a share of 0.25 on decisive tokens")
