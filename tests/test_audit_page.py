"""The page on which a person reviews an audit, in a real browser and without a network."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Request, sync_playwright
from test_plots_page import BROWSER, needs_browser

from stages.auditing import page as audit_page
from stages.auditing.page import write_page
from stages.data.csv_table import read_csv_table

HOSTILE = ['</script><script>alert(1)</script>', '<img src="x" onerror="alert(1)">', '=1+1, "a"; b',
           "__proto__", "猫 café", "\u202eולחן", "w" * 300, "café"]  # fmt: skip
KINDS = ["label error", "blurred", "near duplicate", "two labels"]
COLUMNS = ["digest", "label", "was", "path", "comment"]


def image(path: str) -> Image.Image:
    """Pixels that follow from the path."""
    random = np.random.default_rng(list(path.encode()))
    noise = random.integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((240, 320))


def make_findings(count: int, classes: list[str] = KINDS) -> pd.DataFrame:
    """A finding per image, in turn of each kind; every eighth image also has low contrast."""
    rows = []
    for number in range(count):
        kind, label = KINDS[number % 4], classes[number % len(classes)]
        other = classes[(number + 1) % len(classes)]
        row = {
            "path": f"train/{label}/{number:04}.jpg",
            "kind": kind,
            "score": 1.0 - number / count,
            "label": label,
            "suggestion": other if kind in ("label error", "two labels") else "",
            "digest": f"{number:032x}",
            "other": f"val/{number:04}.png" if kind in ("near duplicate", "two labels") else "",
        }
        rows.append(row)
        if number % 8 == 0:
            rows.append({**row, "kind": "low contrast", "suggestion": "", "other": ""})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


class Tab:
    """A review page in a browser that remembers nothing of other tests; time passes as asked."""

    def __init__(self, browser: Browser, path: Path, findings=None, classes=KINDS) -> None:
        if findings is not None:
            typical = {name: [f"{name} {number}" for number in range(2)] for name in classes}
            shown = image, classes, typical, ["A <b>note</b>"], "<i>photos</i>"
            self.counts = write_page(path, findings, *shown)
        self.page: Page = browser.new_context(offline=True).new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._note_request)
        self.page.clock.install(time=0)
        self.page.clock.pause_at(1000)  # or it would go on by itself
        self.page.goto(path.as_uri())
        self.wait()

    def wait(self) -> None:
        """Until a key is meant for the image that is seen."""
        for _ in range(200):
            if self.page.get_attribute("#main", "aria-busy") == "false":
                return
            self.page.clock.run_for(100)
        raise AssertionError("the image is not drawn")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.wait()

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def save(self, path: Path) -> pd.DataFrame:
        with self.page.expect_download() as download:
            self.page.keyboard.press("Control+s")
        assert download.value.suggested_filename == "corrections.csv"
        download.value.save_as(path)
        return read_csv_table(path, COLUMNS)

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.problems.append(request.url)


@needs_browser
def test_ten_decisions_by_keyboard_survive_a_reload_and_are_saved(browser, tmp_path):
    findings = make_findings(12)
    tab = Tab(browser, tmp_path / "audit.html", findings)
    assert tab.counts == {
        "label error": 3, "low contrast": 2, "blurred": 3, "near duplicate": 3, "two labels": 3,
        "left out": 0,
    }  # fmt: skip
    assert tab.page.title() == tab.text("h1") == "Audit of <i>photos</i>"
    assert tab.text("#notes li") == "A <b>note</b>"
    assert tab.page.locator("#typical img").count() == 4
    tab.press("Enter", "s")  # the second image has no suggestion
    assert "no suggestion" in tab.text("#status") and tab.text("#count") == "1 of 12 decided"
    tab.press("x", "4", "s", "1", "u", "ArrowLeft", "ArrowRight", "Enter")
    assert tab.text("#count") == "5 of 12 decided"

    tab.page.reload()
    tab.wait()
    assert tab.text("#count") == "5 of 12 decided"
    assert tab.text("#label") == KINDS[5 % 4]  # the next one that is open
    tab.press("X", "3", "/")
    tab.page.keyboard.type("BLUR")
    tab.press("Enter", "/")
    tab.page.keyboard.type("sux1")
    tab.press("Escape", "u", "u", "2", "Enter", "Enter", "x", "ArrowLeft", "Enter")
    assert tab.text("#count") == "10 of 12 decided"

    saved = tab.save(tmp_path / "saved.csv")
    decided = {
        0: "label error", 1: "", 2: "two labels", 3: "label error", 4: "label error", 5: "",
        6: "blurred", 7: "two labels", 8: "label error", 9: "blurred",
    }  # fmt: skip
    expected = findings.drop_duplicates("digest").iloc[list(decided)]
    expected = expected.assign(was=expected["label"], label=list(decided.values()))
    expected["comment"] = expected["kind"]
    expected.loc[expected["digest"].isin([f"{n:032x}" for n in (0, 8)]), "comment"] += (
        "; low contrast"
    )
    expected = expected[COLUMNS].sort_values("path")
    assert saved.values.tolist() == expected.values.tolist()
    assert "python -m stages audit --apply ~/Downloads/corrections.csv" in tab.text("#status")
    assert tab.problems == []


@needs_browser
def test_one_press_decides_one_image(browser, tmp_path):
    tab = Tab(browser, tmp_path / "audit.html", make_findings(12))
    count = itertools.count(1)

    def check() -> None:
        tab.wait()
        assert tab.text("#count") == f"{next(count)} of 12 decided"

    for key in ("Enter", "x", "1"):  # at once, for the image before; time stands still
        tab.page.keyboard.press(key)
    check()
    tab.page.keyboard.press("Enter")
    for _ in range(3):
        tab.page.clock.run_for(100)
        tab.page.keyboard.press("x")
    check()
    for _ in range(3):  # held down
        tab.page.keyboard.down("Enter")
        tab.wait()
    tab.page.keyboard.up("Enter")
    check()
    drop = tab.page.locator("[data-key=x]")
    drop.click()
    drop.click()
    check()
    tab.page.mouse.down(click_count=2)  # where the button still is: a slow double click
    tab.page.mouse.up(click_count=2)
    tab.wait()
    assert tab.text("#count") == "4 of 12 decided"
    tab.press("Enter")  # is not the button that was clicked
    assert tab.text("#status").endswith(": label is right")
    next(count)
    tab.page.focus("[data-key=x]")
    for _ in range(3):
        tab.page.keyboard.down("Enter")  # is the button
        tab.wait()
    tab.page.keyboard.up("Enter")
    check()
    tab.page.keyboard.press("x")  # too soon is told, but for an undo it never is
    tab.page.keyboard.press("x")
    assert "Too soon" in tab.text("#status")
    tab.page.keyboard.press("u")
    tab.page.keyboard.press("u")
    tab.wait()
    assert tab.text("#count") == "5 of 12 decided"


@needs_browser
def test_a_kind_is_reviewed_by_itself_and_a_tab_does_not_close_unsaved(browser, tmp_path):
    tab = Tab(browser, tmp_path / "audit.html", make_findings(12))
    tab.page.focus("nav button:has-text('near duplicate')")
    tab.press("Enter")  # the next one is for the image
    tab.wait()
    assert tab.page.locator("figure").count() == 2  # with the other image of the pair
    assert tab.text("figure:nth-child(2) figcaption").split("\n")[1] == "val/0002.png"
    tab.press("x", "Enter", "x")
    assert tab.text("#end h2") == "All images of this kind are decided; 9 of other kinds are not."
    tab.press("Enter", "x", "s", "1")  # there is no image to decide about
    assert tab.text("#count") == "3 of 12 decided"
    assert "near duplicate 3/3" in tab.text("nav")
    tab.page.click("nav button:has-text('all kinds')")
    tab.wait()
    tab.press("u")
    assert tab.text("#label") == "near duplicate" and tab.text("#count") == "2 of 12 decided"

    for key, code, said in (  # of a French and a Russian keyboard
        ("é", "Digit2", "0010.jpg: relabeled to blurred"),
        ("ы", "KeyS", "0011.jpg: relabeled to label error"),
    ):
        init = {"key": key, "code": code, "bubbles": True}
        tab.page.dispatch_event("body", "keydown", init)
        tab.wait()
        assert tab.text("#status") == said
    tab.press("u", "u")

    asked: list[str] = []
    tab.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    tab.page.reload()
    assert asked == ["beforeunload"]
    tab.wait()
    assert len(tab.save(tmp_path / "saved.csv")) == 2
    tab.page.reload()
    assert asked == ["beforeunload"]


@needs_browser
def test_names_are_text(browser, tmp_path):
    classes = HOSTILE + [f"class {number:03}" for number in range(992)]
    findings = make_findings(len(HOSTILE), classes)
    tab = Tab(browser, tmp_path / "audit.html", findings, classes)
    for name in HOSTILE:
        assert tab.page.text_content("#label") == name
        tab.press("Enter")
    assert tab.text("#end h2") == f"All {len(HOSTILE)} images are decided."
    tab.press("ArrowLeft", "/")
    tab.page.keyboard.type("class 99")
    tab.press("Enter")
    assert tab.text("#status") == "2 classes have this in their names: type more of one."
    tab.page.keyboard.type("0")
    tab.press("Enter", "ArrowLeft", "ArrowLeft", "/")
    tab.page.keyboard.type("CAFÉ")
    tab.press("Enter")
    saved = tab.save(tmp_path / "saved.csv").set_index("digest").sort_index()
    names = [*HOSTILE[:6], "café", "class 990"]
    assert saved["label"].tolist() == names
    firsts = findings.drop_duplicates("digest")
    assert saved[["was", "path"]].values.tolist() == firsts[["label", "path"]].values.tolist()
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    for width in (390, 700, 1300):
        tab.page.set_viewport_size({"width": width, "height": 800})
        scroll, inner = tab.page.evaluate(widths)
        assert scroll <= inner == width
    assert tab.problems == []


@needs_browser
def test_without_storage_the_page_says_so_and_works(browser, tmp_path):
    tab = Tab(browser, tmp_path / "audit.html", make_findings(4))
    assert not tab.page.is_visible("#unstored")
    tab.page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw 1 } })")
    tab.page.reload()
    tab.wait()
    assert "save before you close it" in tab.text("#unstored")
    tab.press("Enter", "x")
    assert tab.page.is_visible("#unstored")
    assert len(tab.save(tmp_path / "saved.csv")) == 2


def read_data(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_files_with_the_same_content_are_one_question(tmp_path):
    """Such as a file in the folders of two classes: each is the other's pair."""
    first = make_findings(4)[-1:]
    second = first.assign(path=first["other"], other=first["path"], label="blurred")
    both = pd.concat([first, second, second.assign(kind="label error")], ignore_index=True)
    counts = write_page(tmp_path / "audit.html", both, image, KINDS, {}, [], "d")
    assert counts == {"two labels": 1, "left out": 0}
    (asked,) = read_data(tmp_path / "audit.html")["images"]
    assert (asked["path"], asked["label"]) == ("train/two labels/0003.jpg", "two labels")
    assert [each["other"] for each in asked["findings"]] == ["val/0003.png"]


def test_the_page_keeps_to_its_size_and_takes_the_worst_of_each_kind_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_page, "MAX_FINDINGS", 4)
    findings = make_findings(32).sample(frac=1, random_state=0, ignore_index=True)
    ranks = findings.groupby("kind")["score"].rank(ascending=False)
    ours = findings[ranks <= 4]
    in_turn = ours.loc[ranks[ours.index].sort_values(kind="stable").index, "digest"].unique()
    left_out = []
    for limit in (50_000, 150_000, 10_000_000):
        path = tmp_path / f"{limit}.html"
        counts = write_page(path, findings, image, KINDS, {}, [], "d", max_bytes=limit)
        data = read_data(path)
        on_page = [each["digest"] for each in data["images"]]
        assert path.stat().st_size < limit
        assert {*on_page} == {*in_turn[: len(on_page)]}
        assert on_page == [digest for digest in ours["digest"].unique() if digest in on_page]
        left_out.append(counts.pop("left out"))
        assert left_out[-1] == data["left_out"] == 32 - len(on_page)
        assert counts == ours[ours["digest"].isin(on_page)]["kind"].value_counts().to_dict()
    assert 32 > left_out[0] > left_out[1] > left_out[2] == 32 - len(in_turn)
    assert write_page(path, findings[:0], image, KINDS, {}, [], "d") == {"left out": 0}
