"""Chromium for the tests of pages: Playwright's if it is installed, else the system's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        paths = playwright.chromium.executable_path, *filter(None, map(shutil.which, CHROMES))
        path = next((path for path in paths if Path(path).exists()), None)
        if path is None:
            pytest.skip("needs a browser: install Chromium, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()
