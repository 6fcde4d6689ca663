"""How the page is served: to whom, with which headers, and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from kvstrata.http.dashboard import Page
from kvstrata.testing.api import Api, Served, serving
from kvstrata.testing.client import small_settings

TOKEN = "0123456789abcdef-token"

pytestmark = pytest.mark.leaks_allowed(
    "the server's threads come when requests need them, and end with the fixtures"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All but the page wants a token."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "token").write_text(TOKEN)
    (directory / "token").chmod(0o600)
    settings = small_settings(http_token_file=str(directory / "token"), runtime_dir=str(directory))
    with serving(settings) as served:
        yield served


def test_every_file_comes_without_token_and_with_strict_headers(served: Served) -> None:
    stranger = Api(served.api.host, served.api.port)
    paths = Page.load().paths
    assert {"/", "/assets/main.js", "/assets/page.css", "/assets/uplot/uPlot.iife.min.js"} <= paths
    for path in paths:
        answer = stranger.ask("GET", path)
        assert answer.status == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert "http:" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        head = stranger.ask("HEAD", path)
        assert (head.status, head.body) == (200, b"")
    assert stranger.ask("GET", "/").headers["content-type"] == "text/html; charset=utf-8"
    assert stranger.ask("GET", "/assets/main.js").headers["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "/assets/",
        "/assets/index.html",
        "/assets/../access.py",
        "/assets/..%2faccess.py",
        "/assets/%2e%2e/access.py",
        "/assets//etc/passwd",
        "/assets/uplot/LICENSE",
        "/assets/__init__.py",
        "/index.html",
        "//",
    ],
)
def test_nothing_else_is_served(served: Served, path: str) -> None:
    assert Api(served.api.host, served.api.port).ask("GET", path).status == 401
    assert served.api.ask("GET", path).status == 404


def test_the_page_is_no_way_around_the_token(served: Served) -> None:
    stranger = Api(served.api.host, served.api.port)
    for method, path in (("POST", "/"), ("DELETE", "/"), ("GET", "/stats"), ("GET", "/prefixes")):
        assert stranger.ask(method, path, {} if method == "POST" else None).status == 401


def test_on_loopback_it_goes_by_its_own_name_only(tmp_path: Path) -> None:
    with serving(small_settings(runtime_dir=str(tmp_path))) as served:
        assert served.api.ask("GET", "/", headers={"host": "evil.example"}).status == 403
        assert served.api.ask("GET", "/", headers={"host": "localhost"}).status == 200


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    with serving(small_settings(http_dashboard=False, runtime_dir=str(tmp_path))) as served:
        for path in ("/", "/assets/main.js"):
            assert served.api.ask("GET", path).status == 404
        assert served.api.ask("GET", "/stats").status == 200


def test_it_is_made_of_files_of_its_own_and_of_uplot_with_its_licence() -> None:
    assets = files("kvstrata.http.dashboard") / "assets"
    uplot = assets / "uplot"
    version = "v1.6.32"
    assert version in (uplot / "uPlot.iife.min.js").read_text()[:100]
    assert "Leon Sorokin" in (uplot / "LICENSE").read_text()
    for shipped in ("uPlot.iife.min.js", "uPlot.min.css"):
        told = (uplot / f"{shipped}.license").read_text()
        assert "SPDX-License-Identifier: MIT" in told
        assert version in told
    page = (assets / "index.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert " on" + "click" not in page
    assert "style=" not in page
    for each in assets.iterdir():
        if each.name.endswith(".js"):
            assert len(each.read_text().splitlines()) <= 150, each.name
            assert "innerHTML" not in each.read_text()
