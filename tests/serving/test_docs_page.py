"""Laws of the page that describes the API, in Chromium."""

from __future__ import annotations

import pytest

from tests.helpers.browser import chromium
from tests.helpers.serving import Web, running

pytestmark = pytest.mark.slow


def test_the_page_describes_every_route_and_loads_nothing_from_elsewhere() -> None:
    web, problems, requested = Web(), [], set[str]()
    paths = web.get("/openapi.json").json()["paths"]
    with running(web.app) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 360, "height": 740})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requested.add(request.url))
        page.goto(f"{address}/docs#post/v1/translate")
        page.wait_for_selector("details[open] table")
        page.evaluate("for (const route of document.querySelectorAll('details')) route.open = true")
        shown = {f"{row.get_attribute('id')}" for row in page.locator("details").all()}
        assert shown == {f"{method}{path}" for path, methods in paths.items() for method in methods}
        for name in ("text", "search", "attention"):
            assert page.get_by_role("cell", name=name, exact=True).first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert problems == []
    assert all(url.startswith(address) or url.startswith("data:") for url in requested)
