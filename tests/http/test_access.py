"""Who may use the HTTP API, and what is refused before anything is done."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.errors import ConfigError
from kvstrata.http.access import Access, make_access
from kvstrata.http.guard import MAX_BODY_BYTES
from kvstrata.testing.api import Answer, Api, serving
from kvstrata.testing.client import small_settings

TOKEN = "0123456789abcdef-token"
PROBLEM = "application/problem+json"
WRITES = [
    ("POST", "/clear"),
    ("POST", "/lookup"),
    ("POST", "/entries/delete"),
    ("DELETE", "/entries/x"),
    ("POST", "/pins"),
    ("DELETE", "/pins/x"),
    ("DELETE", "/pins?owner=x"),
    ("POST", "/warm"),
    ("POST", "/verify"),
    ("PATCH", "/runtime"),
    ("DELETE", "/jobs/x"),
]
READS = ["/metrics", "/stats", "/config", "/tiers", "/entries", "/pins", "/jobs", "/runtime", "/openapi.json"]


def token_file(directory: Path, content: str = TOKEN + "\n", mode: int = 0o600) -> str:
    file = directory / "token"
    file.write_text(content)
    file.chmod(mode)
    return str(file)


def warm(api: Api) -> Api:
    """Let the threads begin that the first request and job make: tests are checked for those they leave."""
    api.wait_job(api.post("/clear", {}))
    return api


@pytest.fixture(scope="module")
def open_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """On loopback, without a token."""
    directory = tmp_path_factory.mktemp("open")
    with serving(small_settings(runtime_dir=str(directory))) as served:
        yield warm(served.api)


@pytest.fixture(scope="module", params=[False, True], ids=["all", "open reads"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """With a token; with reads open or not."""
    directory = tmp_path_factory.mktemp("guarded")
    settings = small_settings(
        http_token_file=token_file(directory), http_open_reads=request.param, runtime_dir=str(directory)
    )
    with serving(settings) as served:
        yield warm(served.api)


def assert_problem(answer: Answer, status: int) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == PROBLEM
    document = answer.json
    assert document["status"] == status
    assert document["type"] == "about:blank"
    assert document["title"]
    assert document["detail"]


def test_writes_want_the_token(guarded: Api) -> None:
    for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "\xe9"):
        other = Api(guarded.host, guarded.port, token)
        for method, path in WRITES:
            answer = other.ask(method, path, {} if method != "DELETE" else None)
            assert_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
    for method, path in WRITES:
        assert guarded.ask(method, path, {} if method != "DELETE" else None).status not in {401, 403}


def test_reads_want_it_unless_they_are_open(guarded: Api, request: pytest.FixtureRequest) -> None:
    stranger = Api(guarded.host, guarded.port)
    expected = 200 if request.node.callspec.params["guarded"] else 401
    for path in READS:
        assert stranger.ask("GET", path).status == expected
        assert guarded.ask("GET", path).status == 200
    for path in ("/health", "/ready"):  # probes carry no token
        assert stranger.ask("GET", path).status == 200
    for scheme in ("Basic ", "", "Bearer"):
        answer = stranger.ask("POST", "/clear", {}, {"authorization": scheme + TOKEN})
        assert_problem(answer, 401)


def test_head_answers_as_get_does_without_the_body(open_api: Api, guarded: Api) -> None:
    for path in ("/health", "/ready", "/stats"):
        asked, got = open_api.ask("HEAD", path), open_api.ask("GET", path)
        assert (asked.status, asked.body) == (200, b"")
        assert asked.headers["content-type"] == got.headers["content-type"]
    stranger = Api(guarded.host, guarded.port)
    assert stranger.ask("HEAD", "/health").status == 200
    assert stranger.ask("HEAD", "/stats").status == stranger.ask("GET", "/stats").status


def test_a_wrong_token_is_told_from_none(guarded: Api) -> None:
    for token, said in ((None, "this wants the token"), ("wrong", "this wants another token")):
        assert said in Api(guarded.host, guarded.port, token).ask("POST", "/clear", {}).json["detail"]


def test_a_request_of_another_name_is_refused_on_loopback(open_api: Api) -> None:
    for host in ("evil.example", "evil.example:8080", "", "127.0.0.1.evil.example", "localhost@evil.example"):
        for method, path in (("GET", "/stats"), ("POST", "/clear")):
            assert_problem(open_api.ask(method, path, {}, {"host": host}), 403)
    for host in ("localhost", "127.0.0.1:1", "[::1]:8080", "LOCALHOST:9"):
        assert open_api.ask("GET", "/stats", headers={"host": host}).status == 200


def test_a_request_of_another_site_cannot_write(open_api: Api) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "https://["):
        assert_problem(open_api.ask("POST", "/clear", {}, {"origin": origin}), 403)
        assert_problem(open_api.ask("DELETE", "/pins?owner=x", headers={"origin": origin}), 403)
    assert_problem(open_api.ask("POST", "/clear", {}, {"sec-fetch-site": "cross-site"}), 403)
    assert open_api.ask("POST", "/clear", {}, {"origin": open_api.url}).status == 202
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert_problem(open_api.ask("POST", "/clear", b"{}", {"content-type": kind}), 415)
    answer = open_api.ask("OPTIONS", "/clear", headers={"origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_large_bodies_are_refused_announced_or_not(open_api: Api) -> None:
    body = b'{"tiers": ["' + b"x" * MAX_BODY_BYTES + b'"]}'
    head = {"content-length": str(len(body))}
    assert_problem(open_api.ask("POST", "/clear", b"{}", head), 413)
    with socket.create_connection((open_api.host, open_api.port), timeout=20) as connection:
        connection.sendall(
            b"POST /clear HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for start in range(0, len(body), 1 << 20):
                part = body[start : start + (1 << 20)]
                connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
            connection.sendall(b"0\r\n\r\n")
        except OSError:  # it may close once it has heard enough
            pass
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert open_api.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/nothing", None, 404, "Not Found"),
        ("PUT", "/clear", {}, 405, "Method Not Allowed"),
        ("GET", "/clear", None, 405, "Method Not Allowed"),
        ("POST", "/clear", b"{", 422, "JSON"),
        ("POST", "/clear", b"\xff\xfe", 422, "JSON"),
        ("POST", "/clear", b"[" * 100_000, 400, "parsing"),
        ("POST", "/clear", [], 422, "body"),
        ("POST", "/clear", {"teirs": None}, 422, "body.teirs"),
        ("POST", "/clear", {"tiers": "l1"}, 422, "body.tiers"),
        ("POST", "/clear", {"tiers": []}, 422, "body.tiers"),
        ("POST", "/clear", {"tiers": ["no"]}, 404, "there is no tier 'no'; there is l1"),
        ("POST", "/lookup", {"tokens": ["1"]}, 422, "body.tokens.0"),
        ("POST", "/lookup", {"tokens": [-1]}, 422, "body.tokens.0"),
        ("POST", "/lookup", {"tokens": [2**32]}, 422, "body.tokens.0"),
        ("POST", "/lookup", {"tokens": [1.5]}, 422, "body.tokens.0"),
        ("POST", "/lookup", {"tokens": [True]}, 422, "body.tokens.0"),
        ("POST", "/lookup", {"tokens": [1]}, 404, "no inference engine has registered"),
        ("POST", "/pins", {"owner": "x", "seconds": 1e30, "prefix": "y"}, 422, "body.seconds"),
        ("POST", "/pins", {"owner": "x", "seconds": 0, "prefix": "y"}, 422, "body.seconds"),
        ("POST", "/verify", {"sample": 0}, 422, "body.sample"),
        ("PATCH", "/runtime", {"l1_budget_bytes": -1}, 422, "body.l1_budget_bytes"),
        ("PATCH", "/runtime", {"l1_budget_bytes": 10**400}, 422, "body.l1_budget_bytes"),
        ("GET", "/entries?limit=0", None, 422, "query.limit"),
        ("GET", "/entries?limit=x", None, 422, "query.limit"),
        ("GET", "/entries?after=x", None, 422, "not a key"),
        ("GET", "/entries?tier=../../etc", None, 404, "there is no tier"),
        ("GET", "/entries/..%2f..%2fetc%2fpasswd", None, 422, "not a key"),
        ("GET", "/entries/a@b@c@d@" + "0" * 64, None, 422, "not a key"),
        ("GET", "/entries/a@b@1@99999999@" + "0" * 64, None, 422, "not a key"),
        ("GET", "/entries/%00", None, 422, "not a key"),
        ("DELETE", "/pins", None, 422, "query.owner"),
    ],
)  # fmt: skip
def test_bad_input_is_a_problem_document_that_says_what_is_wrong(
    open_api: Api, method: str, path: str, body: object, status: int, says: str
) -> None:
    answer = open_api.ask(method, path, body)
    assert_problem(answer, status)
    assert says in answer.json["detail"]


def test_a_fault_names_the_place_and_not_the_value(open_api: Api) -> None:
    answer = open_api.ask("POST", "/lookup", {"tokens": [1], "salt": ["geheim"], "token": "geheim"})
    assert_problem(answer, 422)
    assert {fault["where"] for fault in answer.json["faults"]} == {"body.salt", "body.token"}
    assert b"geheim" not in answer.body


def test_what_is_no_http_does_no_harm(open_api: Api) -> None:
    nonsense = (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /stats HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    )
    for sent in nonsense:
        with socket.create_connection((open_api.host, open_api.port), timeout=20) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1000)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert open_api.ask("GET", "/health").status == 200


def test_the_openapi_document_is_complete(guarded: Api) -> None:
    document = guarded.get("/openapi.json")
    assert set(document["components"]["securitySchemes"]) == {"token"}
    schemas = document["components"]["schemas"]
    assert "Problem" in schemas
    assert "HTTPValidationError" not in schemas
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"].endswith("."), path
            assert operation["tags"], path
            if method != "get":
                assert operation["security"] == [{"token": []}]
            if path not in {"/health", "/ready"}:
                content = operation["responses"]["401"]["content"]
                assert list(content) == [PROBLEM]
    named = json.dumps(document)
    for name in schemas:
        assert f"#/components/schemas/{name}" in named
    for name, schema in schemas.items():
        assert "description" in schema, name


# Before the start


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3"])
def test_without_a_token_it_does_not_listen_for_others(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="http_token_file"):
        make_access(host, None)
    access = make_access(host, token_file(tmp_path))
    assert access.hosts is None
    assert TOKEN not in repr(access)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_on_loopback_it_needs_none(host: str) -> None:
    access = make_access(host, None)
    assert access.token is None
    assert access.hosts is not None
    assert {host, "localhost"} <= access.hosts
    with pytest.raises(ConfigError, match="http_open_reads"):
        make_access(host, None, open_reads=True)


def test_the_token_file_must_be_private_and_hold_a_token(tmp_path: Path) -> None:
    assert make_access("::", token_file(tmp_path, mode=0o440)).token == TOKEN.encode()
    for mode in (0o644, 0o604, 0o620, 0o666):
        with pytest.raises(ConfigError, match="chmod 600"):
            make_access("::", token_file(tmp_path, mode=mode))
    for content in ("", "short", "with a blank in between", "ü" * 30, "x" * 5000):
        with pytest.raises(ConfigError, match="16 or more") as caught:
            make_access("::", token_file(tmp_path, content))
        assert content == "" or content not in str(caught.value)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read|chmod 600"):
            make_access("::", str(path))


def test_tokens_are_compared_as_a_whole() -> None:
    access = Access(token=b"a" * 32)
    assert access.allows("POST", "/clear", b"Bearer " + b"a" * 32)
    assert access.allows("POST", "/clear", b"bearer  " + b"a" * 32)
    for given in (b"", b"Bearer", b"Bearer ", b"Bearer " + b"a" * 31, b"Bearer " + b"a" * 33, b"a" * 32):
        assert not access.allows("POST", "/clear", given)
