"""The page at ``/`` in a real browser, over a real server with real traffic.

A JavaScript error, a warning in the browser's console and a request to anywhere else fail every test.
Screenshots are kept in ``.cache/dashboard``.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request, expect, sync_playwright
from traffic import Conversations, running

from kvstrata.__about__ import __version__
from kvstrata.client import RemoteClient
from kvstrata.config import Settings
from kvstrata.http.serve import HttpServer
from kvstrata.testing.api import Api, Served, serving
from kvstrata.testing.client import CHUNK_SIZE, look, make_namespace, prompt, small_settings, store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = Path(__file__).parents[2] / ".cache" / "dashboard"
TOKEN = "0123456789abcdef-token"
SPACE = make_namespace("org/model")
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"
PATIENCE_MS = 15_000
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="system: needs chromium"),
    pytest.mark.leaks_allowed("the server's threads come when requests need them, and end with the fixtures"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a disk and a tier that is away, under traffic."""
    directory = tmp_path_factory.mktemp("busy")
    settings = small_settings(
        local_disk=str(directory / "kv"), remote_url="redis://127.0.0.1:1", runtime_dir=str(directory)
    )
    with serving(settings) as served, running(served.server.endpoint, SPACE):
        yield served


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Served]:
    """A server that nobody has asked anything yet."""
    with serving(small_settings(local_disk=str(tmp_path / "kv"), runtime_dir=str(tmp_path))) as served:
        yield served


@contextlib.contextmanager
def opened(
    browser: Browser,
    url: str,
    *,
    viewport: dict[str, int] = DESKTOP,
    scheme: str = "light",
    expected: tuple[str, ...] = (),
) -> Iterator[Page]:
    """The page in a tab of its own; nothing may go wrong in it but what is ``expected`` in the console."""
    faults: list[str] = []

    def said(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not any(words in message.text for words in expected):
            faults.append(f"console: {message.text}")

    def asked(request: Request) -> None:
        if not request.url.startswith(url + "/"):
            faults.append(f"a request to {request.url}")

    def popped_up(dialog: Dialog) -> None:
        faults.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("console", said)
    page.on("request", asked)
    page.on("dialog", popped_up)
    page.goto(url + "/")
    yield page
    context.close()
    assert faults == []


def wait_for(page: Page, selector: str, text: str | None = None) -> None:
    found = page.locator(selector).first
    if text is None:
        expect(found).to_be_visible(timeout=PATIENCE_MS)
    else:
        expect(found).to_contain_text(text, timeout=PATIENCE_MS)


def assert_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def find(page: Page, key: str) -> None:
    page.get_by_label("Key begins with").fill(key)
    page.get_by_role("button", name="Search").click()
    wait_for(page, "#entries tbody code", key)


# What it shows


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_shows_what_the_server_does(
    browser: Browser, busy: Served, viewport: dict[str, int], scheme: str
) -> None:
    with opened(browser, busy.api.url, viewport=viewport, scheme=scheme) as page:
        wait_for(page, "#status", "Serving")
        wait_for(page, "#about", __version__)
        wait_for(page, "#notices", "Tier redis is down")
        wait_for(page, "#tiers .tier:nth-child(3)", "circuit breaker is open")
        wait_for(page, "#chart-tokens .legend", "missed")
        wait_for(page, "#entries tbody tr")
        wait_for(page, "#prefixes tbody tr", "org/model")
        expect(page.locator("#tiles .tile", has_text="Look-ups").locator("dd").first).to_contain_text("/s")
        expect(page.locator("#requests .tokens")).to_have_count(15, timeout=PATIENCE_MS)
        meter = page.get_by_role("meter", name="l1: used of its budget")
        assert float(meter.get_attribute("aria-valuenow") or 0) > 0
        explained = page.locator("#requests details").nth(1)
        explained.locator("summary").click()
        expect(explained.locator(".more")).to_contain_text("org/model: ")
        for name in ("ratio", "tokens", "bytes"):
            assert "Latest: " in (page.locator(f"#chart-{name} .plot").get_attribute("aria-label") or "")
            assert painted(page, f"#chart-{name} canvas")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert too_small_to_touch(page) == []
        assert_accessible(page)
        name = f"{'phone' if viewport is PHONE else 'desktop'}-{scheme}.png"
        page.screenshot(path=SCREENSHOTS / name, full_page=True)


def painted(page: Page, canvas: str) -> bool:
    """Whether a canvas shows more than one colour."""
    return bool(
        page.evaluate(
            """(selector) => {
                const canvas = document.querySelector(selector);
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                return new Set(new Uint32Array(data.buffer)).size > 2;
            }""",
            canvas,
        )
    )


def too_small_to_touch(page: Page) -> list[str]:
    """Controls of less than 24 by 24 pixels (WCAG 2.2, 2.5.8)."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("main :is(button, input, select, summary)")]
            .filter((each) => each.getBoundingClientRect().width < 24 || each.getBoundingClientRect().height < 24)
            .map((each) => each.outerHTML)"""
    )
    return found


def test_before_anything_has_happened(browser: Browser, quiet: Served) -> None:
    with opened(browser, quiet.api.url) as page:
        wait_for(page, "#requests", "No look-up was answered yet")
        wait_for(page, "#prefixes", "No prefix was hit yet")
        wait_for(page, "#entries", "l1 holds nothing yet")
        wait_for(page, "#misses", "No look-up yet")
        wait_for(page, "#tiles .tile", "no look-up yet")
        assert_accessible(page)
        page.screenshot(path=SCREENSHOTS / "empty.png", full_page=True)


def test_what_an_operator_has_changed_is_said(browser: Browser, quiet: Served) -> None:
    quiet.api.ask("PATCH", "/runtime", {"stores_frozen": True, "bypass": {"disk": True}})
    with opened(browser, quiet.api.url) as page:
        wait_for(page, "#notices", "Tier disk is bypassed")
        wait_for(page, "#notices", "Stores are frozen")


def test_names_of_others_are_shown_as_text(browser: Browser, quiet: Served) -> None:
    with RemoteClient(quiet.server.endpoint, "hostile", timeout_seconds=10) as client:
        assert client.wait_connected(20)
        hostile = Conversations(client, make_namespace(HOSTILE))
        for _ in range(4):
            hostile.turn(f"r-{HOSTILE}")
    with opened(browser, quiet.api.url) as page:
        wait_for(page, "#requests .id", HOSTILE)
        wait_for(page, "#prefixes tbody", HOSTILE)
        wait_for(page, "#entries tbody code", "vllm@%3Cimg")
        wait_for(page, "#model", HOSTILE)
        page.locator("#requests summary").first.click()
        wait_for(page, "#requests .more", HOSTILE)
        page.locator("#model").select_option(HOSTILE)
        page.get_by_label("Key begins with").fill(HOSTILE)
        page.get_by_role("button", name="Search").click()
        wait_for(page, "#entries", "holds nothing that agrees")
        page.locator("#prefixes button").first.click()
        page.get_by_role("button", name="Delete vllm@%3Cimg").first.click()
        page.get_by_role("button", name="Delete", exact=True).click()
        wait_for(page, "#entries-said", "deleted from l1")
        assert page.locator("img").count() == 1, "only the page's own"
        assert page.title() == "kvstrata"


def test_markup_cannot_be_made_from_strings(browser: Browser, quiet: Served) -> None:
    """Should the page ever try, the browser refuses."""
    with opened(browser, quiet.api.url, expected=("requires 'TrustedHTML' assignment",)) as page:
        refused = page.evaluate(
            """() => {
                try { document.body.innerHTML = "<p>x</p>"; return ""; } catch (error) { return error.name; }
            }"""
        )
        assert refused == "TypeError"


def test_figures_have_units(browser: Browser, quiet: Served) -> None:
    wanted = {
        "bytes": {0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 * 2**40: "10 TiB"},
        "amount": {0: "0", 999: "999", 999.9: "1 k", 12_345: "12.3 k", 4_560_000: "4.56 M"},
        "count": {0: "0", 1_234_567: "1,234,567"},
        "percent": {0: "0 %", 0.456: "45.6 %", 0.99999: "100 %", 1: "100 %"},
        "duration": {
            0.0002: "0.2 ms",
            0.25: "250 ms",
            59: "59 s",
            200: "3 min 20 s",
            3600: "1 h",
            7500: "2 h 5 min",
            273_600: "3 d 4 h",
        },
    }
    asked = [(name, number, text) for name, pairs in wanted.items() for number, text in pairs.items()]
    with opened(browser, quiet.api.url) as page:
        told = page.evaluate(
            """async (asked) => {
                const format = await import("./assets/format.js");
                return asked.map(([name, number]) => [name, number, format[name](number)]);
            }""",
            asked,
        )
        assert [tuple(each) for each in told] == asked


# What it does


def test_an_entry_is_deleted_once_that_is_confirmed(browser: Browser, quiet: Served) -> None:
    stored = prompt(3 * CHUNK_SIZE, 1, SPACE)
    store(quiet.client, stored)
    look(quiet.client, "r", stored)
    first, second = (SPACE.key(chunk.chunk_hash, 0) for chunk in stored.chunks[:2])
    with opened(browser, quiet.api.url) as page:
        find(page, first)
        assert page.locator("#entries tbody tr").count() == 1
        page.get_by_role("button", name=f"Delete {first}").click()
        wait_for(page, "#delete-dialog", first)
        assert_accessible(page)
        page.get_by_role("button", name="Keep it").click()
        assert quiet.api.get(f"/entries/{first}")["l1"] is not None
        page.get_by_role("button", name=f"Delete {first}").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        wait_for(page, "#entries-said", "deleted from l1; being deleted in disk")
        assert page.locator("#entries tbody tr").count() == 0
        assert quiet.server.cache.flush(20)
        assert quiet.api.ask("GET", f"/entries/{first}").status == 404
        assert quiet.api.get(f"/entries/{second}")["l1"] is not None
        page.locator("#tier").select_option("disk")
        wait_for(page, "#entries", "disk holds nothing that agrees")


def test_the_keyboard_suffices(browser: Browser, quiet: Served) -> None:
    stored = prompt(3 * CHUNK_SIZE, 1, SPACE)
    store(quiet.client, stored)
    look(quiet.client, "r", stored)
    key = SPACE.key(stored.chunks[0].chunk_hash, 0)
    with opened(browser, quiet.api.url) as page:
        wait_for(page, "#requests summary")
        page.keyboard.press("Tab")
        expect(page.locator(":focus")).to_have_text("Skip to the figures")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        wait_for(page, "#requests .more", "all of it is held")
        page.get_by_label("Key begins with").focus()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        wait_for(page, "#entries tbody code", key)
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator(":focus")).to_have_text("Keep it")
        page.keyboard.press("Escape")
        expect(page.locator(":focus")).to_have_attribute("aria-label", f"Delete {key}")
        assert quiet.api.get(f"/entries/{key}")["l1"] is not None


# Who may


REFUSED = ("status of 401",)


def with_token(directory: Path, *, open_reads: bool) -> Settings:
    (directory / "token").write_text(TOKEN)
    (directory / "token").chmod(0o600)
    return small_settings(
        runtime_dir=str(directory), http_token_file=str(directory / "token"), http_open_reads=open_reads
    )


def test_deleting_wants_the_token(browser: Browser, tmp_path: Path) -> None:
    with serving(with_token(tmp_path, open_reads=True)) as served:
        stored = prompt(CHUNK_SIZE, 1, SPACE)
        store(served.client, stored)
        look(served.client, "r", stored)
        key = SPACE.key(stored.chunks[0].chunk_hash, 0)
        with opened(browser, served.api.url, expected=REFUSED) as page:
            find(page, key)
            page.get_by_role("button", name=f"Delete {key}").click()
            page.get_by_role("button", name="Delete", exact=True).click()
            wait_for(page, "#token-why", "Deleting wants the token of this server.")
            assert_accessible(page)
            for given in ("wrong-token-of-someone", TOKEN):
                wait_for(page, "#entries-said", "Nothing was deleted: deleting wants the token")
                assert served.api.get(f"/entries/{key}")["l1"] is not None
                page.get_by_label("Token", exact=True).fill(given)
                page.get_by_role("button", name="Use it").click()
                if given != TOKEN:
                    wait_for(page, "#token-why", "was refused")
            wait_for(page, "#entries-said", "deleted from l1")
            assert served.api.ask("GET", f"/entries/{key}").status == 404
            assert page.evaluate("Object.values(sessionStorage)") == [TOKEN]
            assert page.evaluate("localStorage.length + document.cookie.length") == 0


def test_with_a_token_for_reads_it_says_so(browser: Browser, tmp_path: Path) -> None:
    with (
        serving(with_token(tmp_path, open_reads=False)) as served,
        opened(browser, served.api.url, expected=REFUSED) as page,
    ):
        wait_for(page, "#status", "Token wanted")
        wait_for(page, "#notices", "shows its figures only with its token")
        expect(page.locator("#h-tiers")).to_be_hidden()
        expect(page.locator("#links")).to_be_hidden()
        assert_accessible(page)
        page.screenshot(path=SCREENSHOTS / "token.png")
        page.get_by_role("button", name="Enter the token").click()
        page.get_by_label("Token", exact=True).fill(TOKEN)
        page.get_by_role("button", name="Use it").click()
        wait_for(page, "#status", "Serving")
        expect(page.locator("#notices")).to_be_empty()
        wait_for(page, "#entries", "l1 holds nothing yet")
        page.get_by_role("button", name="Token: given").click()
        page.get_by_role("button", name="Forget it").click()
        wait_for(page, "#status", "Token wanted")
        expect(page.locator("#h-tiers")).to_be_hidden()
        assert page.evaluate("sessionStorage.length") == 0


class _Proxy(BaseHTTPRequestHandler):
    """Passes on what is below ``/kv``, with the ``Host`` that it came with."""

    behind: Api

    def _pass_on(self) -> None:
        if not self.path.startswith("/kv/"):
            self.send_error(404)
            return
        kept = ("host", "origin", "sec-fetch-site", "authorization")
        headers = {name: self.headers[name] for name in kept if name in self.headers}
        answer = self.behind.ask(self.command, self.path.removeprefix("/kv"), headers=headers)
        self.send_response(answer.status)
        for name in ("content-type", "content-length", "content-security-policy"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_DELETE = _pass_on  # noqa: N815  names of the standard library

    def log_message(self, *_: object) -> None:
        pass


def test_below_a_path_behind_a_proxy(browser: Browser, quiet: Served) -> None:
    stored = prompt(CHUNK_SIZE, 1, SPACE)
    store(quiet.client, stored)
    look(quiet.client, "r", stored)
    key = SPACE.key(stored.chunks[0].chunk_hash, 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"behind": quiet.api})) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            with opened(browser, f"http://127.0.0.1:{proxy.server_port}/kv") as page:
                wait_for(page, "#status", "Serving")
                find(page, key)
                page.get_by_role("button", name=f"Delete {key}").click()
                page.get_by_role("button", name="Delete", exact=True).click()
                wait_for(page, "#entries-said", "deleted from l1")
        finally:
            proxy.shutdown()
            thread.join()


def test_a_server_that_is_away_is_said_and_waited_for(browser: Browser, quiet: Served) -> None:
    def serve(port: int) -> HttpServer:
        http = HttpServer(quiet.server, port=port, operations=quiet.server.operations, with_page=True)
        http.start()
        return http

    http = serve(0)
    url = f"http://127.0.0.1:{http.port}"
    try:
        with opened(browser, url, expected=("ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE")) as page:
            wait_for(page, "#status", "Serving")
            http.stop()
            wait_for(page, "#status", "No answer")
            wait_for(page, "#notices", "No answer from the server since")
            assert_accessible(page)
            http = serve(http.port)
            wait_for(page, "#status", "Serving")
            expect(page.locator("#notices")).to_be_empty()
    finally:
        http.stop()
