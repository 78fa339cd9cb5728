"""The page of `rl2 view`, driven as people do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import psutil
import pytest
from books import HOSTILE, WORDS, token_row, trajectory, write_replay, write_run, write_step
from playwright.sync_api import Browser, Page, expect

from RL2.io.report import Report
from RL2.tools.view.page import Server, write_page
from RL2.tools.view.run_index import RunIndex

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "spo-0", seed=0, objective="spo")
    write_run(root / "spo-1", seed=1, objective="spo")
    write_run(root / "grpo", seed=0, objective="ppo")
    write_replay(root / "grpo", 2)
    return root


@pytest.fixture(scope="module")
def file(runs: Path) -> Path:
    """As the command makes it."""
    out = runs / "view.html"
    folders = [str(runs / name) for name in ("spo-0", "spo-1", "grpo")]
    done = subprocess.run(
        [sys.executable, "-m", "RL2.tools.cli", "view", *folders, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def open_rollouts(page: Page, file: Path, at: str = "") -> None:
    page.goto(f"{file.as_uri()}#view=rollouts{at}")
    expect(page.locator("#list[data-drawn]")).to_be_visible()


def column(page: Page, place: int) -> list[str]:
    """One figure of the rows, from the top, once what was asked for is drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.locator(f".row .figures > :nth-child({place + 1})").all_inner_texts()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline_s, "the page did not follow within 10 s"
        time.sleep(0.05)


def test_curves_of_methods_with_their_seeds(page: Page, file: Path) -> None:
    page.goto(file.as_uri())
    first = page.locator('.plot[data-metric="test/score"]')
    expect(first.locator(".scatterlayer")).to_be_visible()
    expect(page.locator("#legend button")).to_have_text(["spomean and range of 2 seeds", "grpo"])
    lines = "(plot) => plot.data.map((trace) => [trace.name, trace.visible, trace.fill ?? '', trace.y.length])"
    band = [["spo", True, "", 2], ["spo", True, "tonexty", 2], ["spo", True, "", 2]]
    assert first.evaluate(lines) == [*band, ["grpo", True, "", 2]]
    low, high, mean = first.evaluate("(plot) => plot.data.slice(0, 3).map((trace) => trace.y)")
    assert all(a <= b <= c and b == pytest.approx((a + c) / 2) for a, b, c in zip(low, mean, high, strict=True))
    page.get_by_role("button", name="grpo").click()
    assert [visible for _, visible, *_ in first.evaluate(lines)] == [True, True, True, False]
    page.get_by_label("Find a metric").fill("time/")
    expect(page.locator("figcaption")).to_have_text(["time/step_s"])
    expect(page.locator("#settings tbody th")).to_contain_text(["actor.objective", "trainer.seed"])


def test_choosing_a_run_a_split_and_a_step(page: Page, file: Path) -> None:
    open_rollouts(page, file)
    expect(page.locator("#found")).to_have_text("144 rollouts")
    page.get_by_label("Run", exact=True).select_option("grpo")
    expect(page.locator("#found")).to_have_text("48 of 144 rollouts")
    page.get_by_label("Split").select_option("test")
    page.get_by_label("Step", exact=True).select_option("step 2")
    expect(page.locator("#found")).to_have_text("6 of 144 rollouts")
    expect(page.locator(".row")).to_have_count(6)
    assert column(page, 0) == ["2"] * 6
    assert column(page, 1) == ["test"] * 6
    page.get_by_label("Outcome").select_option("rewarded")
    expect(page.locator(".row")).to_have_count(3)
    assert column(page, 3) == ["✓ 1"] * 3
    assert page.locator(".row p").all_inner_texts() == [f"answer {row} of step 2 test" for row in (1, 3, 5)]


def test_sorting(page: Page, file: Path) -> None:
    open_rollouts(page, file)
    sort = page.get_by_role("group", name="Sort by")
    sort.get_by_role("button", name="length").click()
    assert set(column(page, 4)) == {"8"}
    sort.get_by_role("button", name="length").click()
    assert set(column(page, 4)) == {"3"}
    sort.get_by_role("button", name="loss").click()
    assert column(page, 5)[:6] == ["5.8"] * 3 + ["5.3"] * 3  # row 5 at step 2, then at step 0, of three runs
    sort.get_by_role("button", name="loss").click()
    assert column(page, 5)[:3] == ["0.25"] * 3  # what has no loss is last either way
    sort.get_by_role("button", name="reward").click()
    assert set(column(page, 3)) == {"✓ 1"}


def test_searching(page: Page, file: Path) -> None:
    open_rollouts(page, file)
    page.get_by_label("Search texts").fill("ANSWER 4 of step 3")
    expect(page.locator("#found")).to_have_text("6 of 144 rollouts")
    expect(page.locator(".row")).to_have_count(6)
    assert {text[:18] for text in page.locator(".row p").all_inner_texts()} == {"answer 4 of step 3"}
    page.locator(".row").first.click()
    expect(page.locator(".pane .text").nth(1)).to_have_text("answer 4 of step 3 test")
    assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["answer 4 of step 3"]
    expect(page.locator(".pane .hint")).to_contain_text("trainer.token_stats_freq")
    page.get_by_label("Search texts").fill("nowhere to be found")
    expect(page.locator("#found")).to_have_text("0 of 144 rollouts")


def test_the_microscope(page: Page, file: Path) -> None:
    open_rollouts(page, file)
    page.get_by_label("Split").select_option("train")
    page.locator(".row").nth(2).click()
    said = page.locator(".pane .said")
    expect(said).to_have_text(["four", " plus", " five", " is", " nine"], use_inner_text=False)
    expect(page.locator(".pane .given")).to_have_text(["Question", " 2?"], use_inner_text=False)
    expect(page.locator(".said.off")).to_have_count(1)  # not the most likely token
    said.nth(0).hover()
    tip = page.get_by_role("tooltip")
    expect(tip).to_contain_text("1 of 5")
    expect(tip.locator("li")).to_have_count(5)
    expect(tip.locator("li.taken")).to_have_count(1)
    expect(tip.locator("li").nth(1)).to_contain_text("four")
    for name in ("p", "p max", "rank", "entropy", "loss", "gradient", "gap"):
        expect(tip.locator("dt").get_by_text(name, exact=True)).to_be_visible()
    assert tip.locator("dd").all_inner_texts()[2] == "2"
    strengths = "(spans) => spans.map((span) => getComputedStyle(span).backgroundColor)"
    page.get_by_label("Statistic").select_option("loss")  # 0, 0.1, ... 0.4
    alphas = [color.rpartition(",")[2].strip(" )") for color in said.evaluate_all(strengths)]
    assert [float(alpha) for alpha in alphas] == pytest.approx([0, 0.155, 0.31, 0.465, 0.62], abs=0.005)
    page.get_by_label("Statistic").select_option("gradient weight")  # 0.1, 0.08, ... 0.02
    assert float(said.evaluate_all(strengths)[0].rpartition(",")[2].strip(" )")) == pytest.approx(0.62, abs=0.005)


def test_tool_calls_and_observations(page: Page, tmp_path: Path) -> None:
    """Marked in the texts and token by token, in a call whose marks end inside of tokens."""
    write_run(tmp_path / "run", seed=0, objective="spo", steps=1, rows=1)
    report, rng = Report(tmp_path / "run", is_first=True, num_steps=3), Random(0)
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    pieces = ["I", " add.<tool", call.removeprefix("<tool"), "<|im_end|>", "user", " 42", "So", " 42"]
    for step in (1, 2):
        one = trajectory(0, 0, f"I add.{call}", 1.0, len(pieces))
        before = one.texts[0] + one.texts[1]
        one.texts += [before + "<|im_end|>user 42", "So 42"]
        report.samples(step, "train", [one])
        if step == 1:
            row = token_row(one, step, rng, trains=False)
            mask = [False, False, *[piece not in ("user", " 42") or n == 7 for n, piece in enumerate(pieces)]]
            said = [place for place, sampled in enumerate(mask[2:]) if sampled]
            for name in ("logp", "max_logp", "rank", "entropy", "engine_logp", "top", "top_logp"):
                row[name] = [row[name][place] for place in said]
            report.tokens(step, "train", [row | {"tokens": ["Q", "?", *pieces], "sampled": mask, "length": len(said)}])
    write_page(RunIndex([str(tmp_path / "run")]), tmp_path / "view.html")
    open_rollouts(page, tmp_path / "view.html")
    page.get_by_label("Step", exact=True).select_option("step 2")
    page.locator(".row").first.click()
    expect(page.locator(".pane .who")).to_have_text(["prompt", "response with tool calls", "observation", "response"])
    expect(page.locator(".pane mark.call")).to_have_text([call], use_inner_text=False)
    expect(page.locator(".pane .state").nth(1)).to_have_text("<|im_end|>user 42")
    page.get_by_label("Step", exact=True).select_option("step 1")
    page.locator(".row").first.click()
    expect(page.locator(".pane .given.observed")).to_have_text(["user", " 42"], use_inner_text=False)
    expect(page.locator(".pane .said.call")).to_have_count(2)
    expect(page.locator(".pane .scale")).to_contain_text("bold: tool call · barred: observation · underlined")


def test_one_row_at_two_steps_side_by_side(page: Page, file: Path) -> None:
    open_rollouts(page, file)
    page.locator(".row").nth(1).click()
    page.get_by_label("Compare with").select_option(label="step 2, reward 1")
    panes = page.locator(".pane")
    expect(panes).to_have_count(2)
    expect(panes.nth(0).locator("h2")).to_have_text("spo-0, step 0")
    expect(panes.nth(1).locator("h2")).to_have_text("spo-0, step 2")
    assert (
        panes.nth(0).locator(".scale").inner_text() == panes.nth(1).locator(".scale").inner_text()
    )  # one scale for both
    at, beside = (panes.nth(n).bounding_box() for n in (0, 1))
    assert at is not None
    assert beside is not None
    assert at["x"] + at["width"] <= beside["x"] + 1
    page.reload()  # what is open stands in the address
    expect(panes.nth(1).locator("h2")).to_have_text("spo-0, step 2")
    page.get_by_role("button", name="Close").click()
    expect(panes).to_have_count(1)


def test_objectives_side_by_side(page: Page, file: Path) -> None:
    """On the rollouts of a step that `rl2 replay` has put through them."""
    open_rollouts(page, file)
    page.get_by_label("Run", exact=True).select_option("grpo")
    page.get_by_label("Split").select_option("train")
    page.get_by_label("Step", exact=True).select_option("step 2")
    page.locator(".row").nth(1).click()
    page.get_by_label("Compare with").select_option("itself, by another statistic")
    expect(page.locator(".pane")).to_have_count(2)
    for n, objective in enumerate(("spo", "sft")):
        page.get_by_label("Statistic").nth(n).select_option(f"gradient weight by {objective}")
    tints = "(spans) => spans.map((span) => Number(getComputedStyle(span).backgroundColor.match(/[\\d.]+/g)[3] ?? 1))"
    assert page.locator(".pane").nth(0).locator(".said").evaluate_all(tints) == pytest.approx(
        [0.62, 0, 0, 0], abs=0.005
    )
    assert page.locator(".pane").nth(1).locator(".said").evaluate_all(tints) == pytest.approx([0.62] * 4, abs=0.005)
    page.locator(".pane").nth(1).locator(".said").nth(2).hover()
    expect(page.get_by_role("tooltip").locator("dt.wide + dd")).to_have_text(["0", "0.5"])
    page.get_by_role("tab", name="Curves").click()
    expect(page.locator("#replays h2")).to_have_text("grpo, step 2, through several objectives")
    row = ["0.25", "2", "33", "0.125", "1.5", "\N{EN DASH}", "1", "0.75"]
    expect(page.locator("#replays tbody tr").first.locator("td")).to_have_text(row)


def test_the_rows_that_a_run_trains_on(page: Page, file: Path) -> None:
    page.goto(file.as_uri())
    page.get_by_role("tab", name="Data").click()
    expect(page.locator("#data h2")).to_have_text(["spo-0", "spo-1", "grpo"])
    expect(page.locator("#data article")).to_have_count(15)
    expect(page.locator("#data article").nth(5)).to_contain_text("Question 1?answer 1")
    expect(page.locator("#data .trains").nth(5)).to_have_text("answer 1")
    page.reload()
    expect(page.locator("#data")).to_be_visible()


def test_the_keyboard_is_enough(page: Page, file: Path) -> None:
    page.goto(file.as_uri())
    expect(page.locator(".plot .scatterlayer").first).to_be_visible()

    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    press("2", "ArrowDown", "ArrowDown")
    expect(page.locator(".row[aria-selected=true]")).to_have_attribute("aria-posinset", "2")
    press("End")
    expect(page.locator(".row[aria-selected=true]")).to_have_attribute("aria-posinset", "144")
    press("/")
    page.keyboard.type("answer 1 of step 0 train")
    expect(page.locator("#found")).to_have_text("3 of 144 rollouts")
    press("Enter")
    expect(page.locator(".pane h2")).to_have_text("spo-0, step 0")
    press("Enter")
    expect(page.locator(".said.at")).to_have_text("four")
    press("ArrowRight")
    expect(page.get_by_role("tooltip")).to_contain_text("2 of 4")
    statistic = page.get_by_label("Statistic")
    before = statistic.input_value()
    press("s")
    assert statistic.input_value() != before
    press("c")
    expect(page.locator(".pane h2").nth(1)).to_have_text("spo-0, step 1")
    press("c")
    expect(page.locator(".pane h2").nth(1)).to_have_text("spo-0, step 2")
    press("Escape", "Escape")
    expect(page.locator(".pane")).to_have_count(1)
    press("]")
    expect(page.locator(".pane h2")).to_have_text("spo-0, step 1")
    press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    press("Escape", "3")
    expect(page.locator("#data")).to_be_visible()
    press("1")
    expect(page.locator("#curves")).to_be_visible()
    page.get_by_role("tab", name="Curves").press("ArrowLeft")
    expect(page.locator("#data")).to_be_visible()


def test_what_a_model_writes_does_not_run(page: Page, tmp_path: Path) -> None:
    write_run(tmp_path / "<b onclick=alert(1)>", seed=0, objective=json.dumps(HOSTILE), hostile=True)
    write_run(tmp_path / "tame", seed=0, objective="spo")
    write_page(RunIndex([str(tmp_path / "<b onclick=alert(1)>"), str(tmp_path / "tame")]), tmp_path / "view.html")
    open_rollouts(page, tmp_path / "view.html")
    page.locator(".row").nth(1).click()
    expect(page.locator(".said").last).to_have_text(HOSTILE)
    expect(page.locator(".facts")).to_contain_text(f"{HOSTILE} 0.25 · ")
    page.locator(".said").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("onerror")
    page.locator(".row").nth(0).click()
    expect(page.locator(".facts")).to_contain_text(HOSTILE)
    page.get_by_role("tab", name="Data").click()
    expect(page.locator("#data .trains").first).to_contain_text(HOSTILE)
    page.get_by_role("tab", name="Curves").click()
    expect(page.locator("#settings td").first).to_contain_text("onerror")
    expect(page.locator("#legend")).to_contain_text("<b onclick=alert(1)>")
    assert page.evaluate("window.owned") is None
    assert page.locator("img, #legend b, main script").count() == 0


def test_no_script_of_others_would_run(browser: Browser, file: Path, tmp_path: Path) -> None:
    """Even one that got into the page as HTML: the browser knows the two scripts that may."""
    with_guest = tmp_path / "guest.html"
    with_guest.write_text(file.read_text().replace("</body>", "<script>window.owned = 1</script></body>"))
    refused: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: refused.append(message.text))
    page.goto(with_guest.as_uri())
    assert page.evaluate("window.owned") is None
    page.close()
    assert any("Content Security Policy" in text for text in refused)


CONTRAST = """([ink, ...layers]) => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = (under, [r, g, b, a = 1]) => under.map((x, c) => x * (1 - a) + [r, g, b][c] * a);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, share, c) => sum + share * linear(rgb[c] / 255), 0);
  const both = [light(parse(ink)), light(layers.map(parse).reduce(over, [0, 0, 0]))];
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_well(browser: Browser, file: Path, scheme: str) -> None:
    """Contrast of text and what is behind it, by WCAG 2: 7 for the text, 4.5 for what is beside it."""
    context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    open_rollouts(page, file)
    page.locator(".row").nth(1).click()
    page.get_by_label("Statistic").select_option("entropy")
    style = "(element) => [getComputedStyle(element).color, getComputedStyle(element).backgroundColor]"
    _, card = page.locator(".tokens").evaluate(style)
    ink, _ = page.locator(".said").first.evaluate(style)
    muted, _ = page.locator(".given").first.evaluate(style)
    tints = page.locator(".said").evaluate_all("(spans) => spans.map((span) => getComputedStyle(span).backgroundColor)")
    assert page.evaluate(CONTRAST, [ink, card]) >= 7
    assert page.evaluate(CONTRAST, [muted, card]) >= 4.5
    assert min(page.evaluate(CONTRAST, [ink, card, tint]) for tint in tints) >= 4.5
    page.get_by_role("tab", name="Data").click()
    ink, tint = page.locator("#data .trains").first.evaluate(style)
    muted, _ = page.locator("#data .given").first.evaluate(style)
    assert page.evaluate(CONTRAST, [ink, card, tint]) >= 7
    assert page.evaluate(CONTRAST, [muted, card]) >= 4.5
    context.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    write_run(tmp_path / "run", seed=0, objective="spo", steps=2)
    server = Server(RunIndex([str(tmp_path / "run")]), port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, tmp_path / "run"
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_a_served_page_follows_the_run(page: Page, served: tuple[Server, Path]) -> None:
    server, folder = served
    page.goto(f"{server.address}#view=rollouts")
    expect(page.locator("#found")).to_have_text("24 rollouts")
    page.locator(".row").nth(3).click()
    shown = page.locator(".pane h2").inner_text(), page.locator(".facts").inner_text()
    report = Report(folder, is_first=True, num_steps=9)
    write_step(report, 2, Random(0))
    expect(page.locator("#found")).to_have_text("36 rollouts")
    assert (page.locator(".pane h2").inner_text(), page.locator(".facts").inner_text()) == shown
    page.get_by_role("tab", name="Curves").click()
    steps = "document.querySelector('.plot[data-metric=\"train/score\"]')?.data?.[0].x"
    wait_until(lambda: page.evaluate(steps) == [0, 1, 2])
    report.keep_before(1)  # as a resumed run does
    wait_until(lambda: page.evaluate(steps) == [0])
    expect(page.locator("#total")).to_have_text("12")


def prose(rng: Random, words: int) -> str:
    """About as hard to compress as what a model writes."""
    return " ".join(rng.choice((*WORDS, str(rng.randrange(10**6)), f"{rng.randrange(10**8):x}")) for _ in range(words))


def test_a_hundred_thousand_rollouts(browser: Browser, tmp_path: Path) -> None:
    """From the navigation's start to a list with texts; the best of three, as the machine may have other work."""
    folder, number, rng = tmp_path / "run", 100_000, Random(0)
    folder.mkdir()
    report = Report(folder, is_first=True, num_steps=1000)
    for step in range(1000):
        found = [trajectory(row, 0, prose(rng, 70), float(rng.random() < 0.5), 70) for row in range(number // 1000)]
        report.samples(step, "train", found)
        report.step(step, {"train/score": rng.random(), "actor/loss": rng.random()})
        if step % 100 == 0:
            report.tokens(step, "train", [token_row(one, step, rng, trains=True) for one in found])
    write_page(RunIndex([str(folder)]), out := tmp_path / "view.html")
    seconds = []
    for _ in range(3):
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{out.as_uri()}#view=rollouts", wait_until="commit")
        page.locator(f"#list[data-drawn='{number}'] .row p:not(:empty)").first.wait_for()
        seconds.append(page.evaluate("performance.now()") / 1000)
        if len(seconds) < 3:
            context.close()
    page.wait_for_load_state()
    page.get_by_role("button", name="reward").click()
    page.locator(".row").nth(5).click()
    page.locator("#list").evaluate("(list) => { list.scrollTop = list.scrollHeight / 2; }")
    expect(page.locator(".row").first).to_have_attribute("aria-posinset", "49997")  # four rows above the middle
    began_s = time.monotonic()
    page.get_by_label("Search texts").fill("apples  so")
    expect(page.locator("#found")).to_have_text(re.compile(r"^[\d,]+ of 100,000 rollouts$"), timeout=30_000)
    search_s = time.monotonic() - began_s
    page.get_by_role("tab", name="Curves").click()
    expect(page.locator(".plot .scatterlayer").first).to_be_visible()
    session = context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")["usedSize"] / 2**20
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    memory = (
        max(psutil.Process(int(one["id"])).memory_full_info().uss for one in processes if one["type"] == "renderer")
        / 2**20
    )
    print(f"{out.stat().st_size / 2**20:.0f} MiB, drawn after {seconds} s, searched in {search_s:.1f} s")
    print(f"heap {heap:.0f} MiB, renderer {memory:.0f} MiB")
    context.close()
    assert min(seconds) < 2
    assert heap < 300
    assert memory < 300
