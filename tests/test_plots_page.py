"""The page of `dvc plots show`, in a real browser without a network."""

import html
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Project
from factories import class_names, make_model, make_prepared
from playwright.sync_api import sync_playwright

from stages.data import arrays
from stages.evaluate import evaluate
from stages.report import figures, page
from stages.report.parameters import Evaluate
from stages.run.files import write_csv

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
CHARTS = {
    "summary", "loss", "accuracy", "recall", "precision_recall", "reliability", "coverage",
    "images",
}  # fmt: skip
PICTURES = {
    f"metrics_plots_{name}_png" for name in ("confusion", "samples", "prepared", "augmented")
}

# What Vega-Lite does is what the templates want.
HARMLESS = ('Dropping "fit-y"', "Using the union of the two domains")

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)"
)


def make_project(root: Path, classes: int, images: int, size=(8, 8, 1)) -> Project:
    """What three stages leave behind, with this repository's dvc.yaml and template."""
    root.mkdir()
    project = Project(root)
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    for name in ("dvc.yaml", "params.yaml", ".dvc/config"):
        shutil.copy(ROOT / name, project / name)
    shutil.copytree(ROOT / ".dvc/plots", project / ".dvc/plots", dirs_exist_ok=True)
    names = class_names(classes)
    counts = {"train": 2 * classes, "val": images // 2, "test": images}
    make_prepared(root, names, counts, size=size, wrong_labels=0.03)
    make_model(root, names, size=size)
    evaluate(
        Evaluate(),
        root / "data/prepared",
        root / "data/model.keras",
        root / "metrics",
        "data/drawn",
    )
    page.write_scripts(root / "metrics/page/vega.js")

    epochs = np.arange(1, 31)
    falling = {name: (2 + n) / epochs for n, name in enumerate(("loss", "val_loss"))}
    rising = {name: 1 - 0.5 / epochs for name in ("accuracy", "val_accuracy")}
    history = pd.DataFrame({"epoch": epochs, **falling, **rising, "learning_rate": 0.001})
    write_csv(project / "metrics/history.csv", history.round(4))
    table = pd.DataFrame({"class": names, "train": 9, "val": 2, "test": range(classes)})
    write_csv(project / "metrics/prepare_classes.csv", table)
    split = arrays.read_split(project / "data/prepared/train")
    figures.image_grid(
        split.gather(np.arange(min(len(split), 200))), [""] * min(len(split), 200), "Prepared",
        project / "metrics/plots/prepared.png", columns=(10,),
    )  # fmt: skip
    parameters = {
        "name": ["train.epochs", "train.dropout"],
        "value": [30, 0.3],
        "default": [20, 0.3],
    }
    write_csv(project / "metrics/parameters.csv", pd.DataFrame(parameters))
    figures.image_grid(
        split.gather(np.arange(12) % len(split)),
        [""] * 12,
        "",
        project / "metrics/plots/augmented.png",
        columns=(6,),
    )
    return project


def browse(index: Path, folder: Path, width: int = 1300) -> tuple[str, list[str], set[str]]:
    """Open a page; return its document once drawn, console messages, addresses asked for."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--log-net-log={log}", "--enable-logging=stderr", "--virtual-time-budget=10000",
            f"--window-size={width},3000", "--dump-dom", index.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    messages = re.findall(r'CONSOLE:\d+\] "(.*)", source:', done.stderr)
    asked = set(re.findall(r'"url":"(https?://[^"]*)"', log.read_text(errors="replace")))
    browser_itself = ("google.com/", "googleapis.com/", "gstatic.com/")
    return (
        done.stdout,
        messages,
        {url for url in asked if not any(o in url for o in browser_itself)},
    )


MEASURE = """<script>setTimeout(() => document.title = JSON.stringify(
  [...document.querySelectorAll("section")].map(section =>
    [...section.querySelectorAll(":scope > div")].map(card => ({
      name: card.id, overflow: card.scrollWidth - card.clientWidth,
      left: card.getBoundingClientRect().left, right: card.getBoundingClientRect().right,
      top: card.getBoundingClientRect().top, bottom: card.getBoundingClientRect().bottom,
      heading: section.querySelector("h1, h2").getBoundingClientRect().top,
    })))), 4000)</script>"""


CUT = """[...document.querySelectorAll("section > div")].flatMap(card => {
  const { left, right } = card.getBoundingClientRect();
  return [...card.querySelectorAll("text, h3, td")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < left || box.right > right;
  }).map(text => text.textContent);
})"""


def layout(document: str) -> list[list[dict]]:
    """Where the cards of each section are, in pixels, as `MEASURE` put it into the title."""
    title = re.search("<title>(.*?)</title>", document, re.DOTALL)[1]
    return [section for section in json.loads(html.unescape(title)) if section]


def check_layout(document: str, width: int) -> None:
    """No card can be scrolled sideways, no half of a wide page is empty, headings come first."""
    sections = layout(document)
    cards = [card for section in sections for card in section]
    assert [card["name"] for card in cards if card["overflow"] > 0] == []
    right = max(card["right"] for card in cards)
    assert right <= width
    for section in sections:
        assert max(card["right"] for card in section) >= right - 1, section
        assert min(card["top"] for card in section) >= section[0]["heading"] - 16
    for above, below in itertools.pairwise(sections):
        assert max(card["bottom"] for card in above) < below[0]["heading"] + 1


def blocks(document: str) -> dict[str, str]:
    """The document's part of each plot, by the plot's name."""
    parts = re.split(r'<div id="(\w+)"', document)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def drawn(document: str) -> set[str]:
    marks = ('class="marks"', "<table>")
    return {name for name, part in blocks(document).items() if any(mark in part for mark in marks)}


@needs_browser
@pytest.mark.parametrize(
    ("classes", "images", "size"),
    [(2, 120, (8, 8, 1)), (100, 2_000, (16, 16, 3))],
)
def test_every_plot_is_drawn_without_a_network(tmp_path, classes, images, size):
    project = make_project(tmp_path / "project", classes, images, size)
    project.dvc("plots", "show")
    index = project / "metrics/page/index.html"
    text = index.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>")
    index.write_text(text, encoding="utf-8")
    if classes == 100:
        check_layout(browse(index, tmp_path, width=800)[0], 800)
    document, messages, asked = browse(index, tmp_path, width=1300)
    check_layout(document, 1300)

    assert drawn(document) == CHARTS
    assert set(blocks(document)) >= CHARTS | PICTURES
    assert "metrics_per_class_csv" not in blocks(document)  # drawn as the chart "recall"
    assert not asked
    assert not [text for text in messages if not any(words in text for words in HARMLESS)]
    for source in re.findall(r'<img src="(?!data:)([^"]*)"', document):
        assert (index.parent / source).is_file()
    assert '<p id="missing" hidden' in document

    pictures = sum(file.stat().st_size for file in (index.parent / "static").iterdir())
    assert index.stat().st_size + pictures < 3_000_000


@needs_browser
def test_plots_diff_overlays_versions_and_a_bare_clone_has_no_pictures(tmp_path):
    """The workspace comes last, though its name is the first of the alphabet.

    On a bare clone what DVC keeps outside Git is missing: pictures and scripts.
    """
    project = make_project(tmp_path / "project", 3, 60)
    (project / ".gitignore").write_text("metrics/page/\n")
    history = pd.read_csv(project / "metrics/history.csv")
    write_csv(project / "metrics/history.csv", history[:3])
    project.commit("one")
    project.git("tag", "zero")
    table = pd.read_csv(project / "metrics/per_class.csv")
    write_csv(project / "metrics/per_class.csv", table.assign(recall=0.5))
    project.dvc("plots", "diff", "zero")
    document, messages, asked = browse(project / "metrics/page/index.html", tmp_path)
    assert drawn(document) == CHARTS and not asked
    assert not [text for text in messages if not any(words in text for words in HARMLESS)]
    for name in CHARTS - {"images"}:
        block = blocks(document)[name]
        assert 0 < block.rfind(">zero<") < block.rfind(">workspace<")
    for name in PICTURES:  # what is drawn of the data, which are the same, is there once
        block = blocks(document)[name]
        assert block.count("<img ") == (1 if "prepared" in name else 2)
        if "prepared" not in name:
            assert 0 < block.find("<p>zero</p>") < block.find("<p>workspace</p>")
    epochs = re.search("titled 'Epoch'.*?role-axis-title", blocks(document)["loss"], re.DOTALL)[0]
    assert re.findall(r">([\d.]+)</text>", epochs) == ["1", "2", "3"]
    assert ">0</text>" not in blocks(document)["reliability"]  # no dot of 0 images in the legend

    shutil.rmtree(project / "metrics/plots")
    shutil.rmtree(project / "metrics/page")
    project.dvc("plots", "show")
    (tmp_path / "bare").mkdir()
    document, _, asked = browse(project / "metrics/page/index.html", tmp_path / "bare")
    assert {url.rpartition("/")[2].partition("@")[0] for url in asked} == {
        "vega", "vega-lite", "vega-embed",
    }  # fmt: skip
    assert '<p id="missing">' in document  # since there is no network either
    assert drawn(document) == {"summary"}  # a table


@needs_browser
def test_the_verdict_is_on_top_and_mistakes_are_shown_once_filtered_and_sorted(tmp_path):
    project = make_project(tmp_path / "project", 3, 150)
    project.commit("one")
    project.git("tag", "zero")
    kept = pd.read_csv(project / "metrics/plots/mistakes.csv")
    write_csv(project / "metrics/plots/mistakes.csv", kept[1:].assign(confidence=0.5))
    project.dvc("plots", "diff", "zero")
    verdict = pd.read_csv(project / "metrics/verdict.csv").set_index("name")["value"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_context(offline=True).new_page()
        tab.goto((project / "metrics/page/index.html").as_uri())
        top = tab.locator("#result").inner_text().replace("\xa0", " ")
        assert top.count(verdict["result"]) == 2 and 0 <= top.find("zero") < top.find("workspace")
        figures = tab.locator("#mistakes figure")
        texts = figures.all_inner_texts()
        assert len(texts) == len(kept)
        assert all(path in text for path, text in zip(kept["path"], texts, strict=True))
        assert "workspace: not among them" in texts[0] and "50 %" not in texts[0]
        assert "zero: " in texts[1] and "workspace: " in texts[1] and "50 %" in texts[1]
        assert figures.nth(0).locator("img").count() == 2  # the image and its heatmap
        link = figures.nth(0).locator("a").get_attribute("href")
        assert link == "../../data/drawn/" + kept["path"][0].replace(" ", "%20")
        tab.locator("#mistakes select").nth(1).select_option("path")
        shown = figures.all_inner_texts()
        paths = sorted(kept["path"])
        assert all(path in text for path, text in zip(paths, shown, strict=True))
        heading = tab.locator("#mistakes h3").inner_text()
        assert heading.endswith(f": zero {len(kept)}, workspace {len(kept) - 1} of {len(kept)}")
        name = kept["class"][0]
        tab.locator("#mistakes select").nth(0).select_option(name)
        of_class = ((kept["class"] == name) | (kept["predicted"] == name)).sum()
        assert figures.count() == of_class < len(kept)
        tab.set_viewport_size({"width": 390, "height": 800})
        tab.reload()
        tab.wait_for_selector("#images svg")
        assert tab.evaluate(CUT) == []
        browser.close()


@needs_browser
@pytest.mark.parametrize(("ending", "loads"), [("", 1), ("#watch", 2)])
def test_a_page_that_is_watched_loads_again(ending, loads):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_context(offline=True).new_page()
        seen = []
        tab.on("load", lambda _: seen.append(1))
        tab.clock.install()
        tab.goto((ROOT / ".dvc/plots/page.html").as_uri() + ending)
        tab.clock.run_for(10_500)
        tab.wait_for_timeout(500)
        browser.close()
    assert len(seen) == loads


def test_the_scripts_are_the_same_bytes_each_time(tmp_path, monkeypatch):
    scripts = []
    for scratch in ("a", "a", "b"):  # bundled, kept from before, bundled again
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / scratch))
        page.write_scripts(tmp_path / "vega.js")
        scripts.append((tmp_path / "vega.js").read_bytes())
    assert scripts[0] == scripts[1] == scripts[2]
    assert b"window.vegaEmbed=" in scripts[0] and len(scripts[0]) < 1_500_000


def test_the_charts_of_dvc_yaml_are_complete_and_their_templates_exist():
    import yaml
    from dvc_render.vega_templates import TEMPLATES

    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    own = {path.stem: path for path in (ROOT / ".dvc/plots").glob("*.json")}
    used = set()
    for plot in pipeline["plots"]:
        ((_, options),) = plot.items()
        assert {"title", "x", "y", "x_label", "y_label", "template"} == options.keys()
        used.add(options["template"])
    assert own.keys() <= used <= own.keys() | {template.DEFAULT_NAME for template in TEMPLATES}
    for path in own.values():
        assert "<DVC_METRIC_DATA>" in json.dumps(json.loads(path.read_text()))
