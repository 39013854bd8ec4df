"""What stands before the page: paths, bodies, names and tokens, by plain HTTP."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from demo_server import Served, ask, served, until
from PIL import Image

from ldm.demo.page import png

pytest.importorskip("gradio", reason="the page needs gradio")


@pytest.fixture(scope="module")
def server(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(kl_model, tmp_path_factory.mktemp("files")) as made:
        yield made


def test_the_page_names_no_other_host_and_its_policy_forbids_all(server: Served) -> None:
    status, body, answer = ask(server.port, "GET", "/")
    assert status == 200 and b"tiny" in body
    policy = answer.getheader("content-security-policy")
    assert "default-src 'self'" in policy and "http" not in policy
    config = json.loads(ask(server.port, "GET", "/config")[1])
    assert config["analytics_enabled"] is False and not config.get("run_history") and "fonts.googleapis" not in body.decode()
    public = [dependency["api_name"] for dependency in config["dependencies"] if dependency["api_visibility"] != "private"]
    assert public == ["draw"]
    assert all("http" not in address for address in config.get("stylesheets") or [])


def test_paths_that_are_not_the_pages_own_are_refused(server: Served, kl_model: Path) -> None:
    secret = kl_model / "model_index.json"
    names = [
        "/etc/passwd",
        "etc/passwd",
        str(secret),
        "http://169.254.169.254/latest",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "~",
        ".",
        "..",
        "/",
        str(server.files),
        f"{server.files}/../../{secret}",
        "C:\\windows\\win.ini",
        "\\\\host\\share",
    ]
    ups = [
        "".join([up] * n) + target
        for up in ("../", "..%2f", "%2e%2e/", "..%252f", "..\\", "....//", "%2e%2e%5c", "..;/")
        for n in range(1, 9)
        for target in ("etc/passwd", "etc%2fpasswd", "etc/passwd%00.png")
    ]
    doors = ("/gradio_api/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy=", "/svelte/", "/")
    asked = [door + name.replace("\\", "%5C") for door in doors for name in names + ups if door + name != "/"]
    assert len(asked) >= 500
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    for path in asked:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert b"root:" not in body and b"model_index" not in body and b"_class_name" not in body, path
        assert answer.status in (400, 403, 404) or path in ("/.", "//"), (path, answer.status)
        if answer.getheader("connection") == "close":
            connection.close()
    link = server.files / "link.png"
    link.symlink_to(secret)
    assert ask(server.port, "GET", f"/gradio_api/file={link}")[0] == 404
    link.unlink()


def test_client_paths_and_addresses_in_requests_are_refused(server: Served, kl_model: Path) -> None:
    for path in (
        "/etc/passwd",
        str(kl_model / "ldm.json"),
        "http://169.254.169.254/",
        "https://example.com/a.png",
        "",
        "x.png",
        7,
        ["/etc/passwd"],
    ):
        for data in (
            [{"path": path, "meta": {"_type": "gradio.FileData"}}],
            [[{"image": {"path": path}}]],
            [{"background": {"path": path}}],
        ):
            body = json.dumps({"data": data, "fn_index": 0, "session_hash": "s"}).encode()
            assert ask(server.port, "POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})[0] == 404, path
    assert ask(server.port, "POST", "/gradio_api/queue/join", b"{", {"Content-Type": "application/json"})[0] == 400
    for path in (
        "/gradio_api/call/generate",
        "/gradio_api/run/predict",
        "/login",
        "/gradio_api/vibe-edit",
        "/gradio_api/process_recording",
    ):
        assert ask(server.port, "POST", path, b"{}", {"Content-Type": "application/json"})[0] == 404
    assert ask(server.port, "DELETE", "/")[0] == 404


def test_other_names_and_other_sites_are_refused(server: Served) -> None:
    assert ask(server.port, "GET", "/", headers={"Host": "evil.example"})[0] == 403  # a name that was made to lead here
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert ask(server.port, "POST", "/gradio_api/queue/join", b"{}", {"Origin": origin})[0] == 403
    assert ask(server.port, "GET", "/", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_a_gigabyte_is_refused_before_it_is_read(server: Served) -> None:
    for path in ("/gradio_api/upload", "/gradio_api/component_server", "/gradio_api/queue/join"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as line:
            line.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {2**30}\r\n\r\n".encode())
            assert line.recv(64).startswith(b"HTTP/1.1 413")
    before = {path for path in server.files.rglob("*") if path.is_file()}
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as line:  # without telling how much comes
        told = b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        line.sendall(told + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(head), head))
        sent, piece = 0, bytes(2**20)
        line.settimeout(20)
        try:
            while sent < 2**28:
                line.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)
        except OSError:
            pass
        assert sent < 2**27
    until(lambda: {path for path in server.files.rglob("*") if path.is_file()} == before)
    assert ask(server.port, "GET", "/")[0] == 200


def test_a_token_opens_every_door_and_is_told_nowhere(kl_model: Path, tmp_path: Path) -> None:
    token = "correct-horse-battery"
    with served(kl_model, tmp_path, token=token) as server:
        for path in (
            "/",
            "/config",
            "/theme.css",
            "/gradio_api/queue/data?session_hash=x",
            f"/gradio_api/file={tmp_path}",
            "/?token=wrong-wrong-wrong",
        ):
            status, body, _ = ask(server.port, "GET", path)
            assert status == 401 and b"gradio_config" not in body
        assert ask(server.port, "POST", "/gradio_api/queue/join", b"{}")[0] == 401
        status, _, answer = ask(server.port, "GET", f"/?token={token}")
        cookie = answer.getheader("set-cookie")
        assert (
            status == 303
            and answer.getheader("location") == "/"
            and "HttpOnly" in cookie
            and "SameSite=Strict" in cookie
            and token not in cookie
        )
        inside = {"Cookie": cookie.split(";")[0], "Host": "a-name-of-this-machine:80"}
        status, body, _ = ask(server.port, "GET", "/", headers=inside)
        assert status == 200 and token.encode() not in body and token.encode() not in ask(server.port, "GET", "/config", headers=inside)[1]
        assert ask(server.port, "GET", "/config", headers={"Authorization": f"Bearer {token}"})[0] == 200


def test_pictures_that_would_fill_the_memory_are_refused_before_they_are_decoded(server: Served) -> None:
    bomb = server.files / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    body = json.dumps({"data": [{"background": {"path": str(bomb)}}], "fn_index": 0, "session_hash": "s"}).encode()
    status, said, _ = ask(server.port, "POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    assert status == 413 and b"too many pixels" in said
    bomb.unlink()


def test_what_editors_sent_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.config.errors import UserError
    from ldm.demo import page

    def sent(data: bytes) -> SimpleNamespace:
        return SimpleNamespace(background=data, layers=[None], composite=None)

    picture = png(Image.new("RGB", (64, 64)))
    monkeypatch.setattr(page, "BLOBS", 3 * len(picture))
    blobs = page.Blobs()
    for name in "abcda":
        blobs[name] = sent(picture)
    assert list(blobs) == ["c", "d", "a"]
    for data, said in ((b"no picture", "not an image"), (png(Image.new("1", (20_000, 20_000))), "too many pixels")):
        with pytest.raises(UserError, match=said):
            blobs["e"] = sent(data)
