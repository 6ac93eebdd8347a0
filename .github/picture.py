"""Make .github/page.png of the page: dvc plots show && python .github/picture.py"""

from pathlib import Path

from playwright.sync_api import sync_playwright

SHOWN = "metrics_plots_confusion_png", "mistakes"  # sections, by one of their plots
HIDDEN = "section p, #metrics_plots_samples_png, #precision_recall, #label_errors"

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(args=["--no-sandbox"], executable_path="/usr/bin/chromium")
    tab = browser.new_page(viewport={"width": 1300, "height": 1500})
    tab.goto(Path("metrics/page/index.html").resolve().as_uri())
    tab.wait_for_selector("#mistakes figure")
    others = "".join(f":not([data-plots~={name}])" for name in SHOWN)
    tab.add_style_tag(content=f"section{others}, {HIDDEN} {{ display: none !important }}")
    tab.screenshot(path=".github/page.png")
    browser.close()
