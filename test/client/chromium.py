"""The Chromium that test/chromium.sh finds or fetches, driven by Playwright."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


class NoChromium(Exception):
    """There is none, and none can be fetched; says how to get one."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, until it is left.

    Raises:
        NoChromium: this machine has none.
    """
    script = Path(__file__).parents[1] / "chromium.sh"
    found = subprocess.run([script], capture_output=True, text=True, check=False)
    if found.returncode:
        raise NoChromium(found.stderr.strip().splitlines()[-1])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found.stdout.strip(), args=FLAGS)
        yield browser
        browser.close()
