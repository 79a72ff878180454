"""A page in headless Chromium. `python tests/browser.py docs/images/app.png` takes the screenshot of the docs."""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

PHOTOS = Path(__file__).parent / "photos"
SHOWN = "#{} svg[aria-label]"  # a heat map, and not the sign that it is being computed


def chromium():
    """Chromium's program, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def opened(page):
    """Serve a page and open it; yields the browser's tab and the list of addresses that it asks for."""
    from playwright.sync_api import sync_playwright

    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    root = getattr(os, "geteuid", lambda: 1)() == 0
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"] if root else [])
            tab = browser.new_page(viewport={"width": 1200, "height": 1000})
            tab.set_default_timeout(120_000)
            asked = []
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(address)
            yield tab, asked
            browser.close()
    finally:
        page.close()


def main(target):
    from parameternet.app import build

    with opened(build("parameternet_50m.tin200", device="cpu")) as (tab, _):
        for place, photo, shown in (("image", "coffee", "routing"), ("second", "rocket", "second_routing")):
            tab.locator(f"#{place} input[type=file]").set_input_files(PHOTOS / f"{photo}.jpg")
            tab.wait_for_selector(SHOWN.format(shown))
        tab.wait_for_timeout(2000)  # what moves has come to rest
        tab.screenshot(path=target, full_page=True)


if __name__ == "__main__":
    main(sys.argv[1])
