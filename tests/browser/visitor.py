"""Somebody who looks at the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


class Visitor:
    """A fresh profile on the page, and what its browser did."""

    def __init__(self, browser: Browser, address: str, width: int = 1200) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page = self.page = self.context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(address)
        page.locator("#run").wait_for()

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def run(self, button: str = "#run", result: str = "#cards .vtc-card") -> str:
        """Press the button; the text of what comes of it."""
        page: Page = self.page
        page.evaluate("document.querySelectorAll('.vtc').forEach((one) => one.dataset.old = 1)")
        page.locator(button).click()
        place, kind = result.split()
        page.locator(f"{place} .vtc:not([data-old]) {kind} >> nth=0").wait_for()
        return page.locator(place).inner_text()

    def choose(self, label: str, value: str) -> None:
        """Pick a value of the list of that name."""
        self.page.get_by_label(label, exact=True).first.click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def type(self, label: str, value: str) -> None:
        """Type what no list has."""
        field = self.page.get_by_label(label, exact=True).first
        field.fill(value)
        field.press("Enter")
        field.blur()
