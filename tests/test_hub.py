"""`hf:OWNER/NAME` and `looptx push`, against a stand-in for the hub on the loopback address."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.hub import download_model, push_model
from looptx_core.checkpoint.registry import resolve_model
from looptx_core.errors import DataError, LooptxError, UsageError

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that these calls need; repositories are in memory.

    large: endings of files that go to its storage of large files. private: names of repositories.
    dead: a part of an address at which the connection breaks off. token: the only one it takes.
    """

    repositories: dict[str, dict[str, bytes]]
    asked: list[str]
    large: tuple[str, ...] = ()
    stored: dict[str, bytes]
    private: set[str]
    dead: str | None = None
    token: str = "hf_of_this_test"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        kept = self.server.repositories
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in kept:
                return self._send(404, X_Error_Code="RepoNotFound")
            files = [{"rfilename": file, "path": file, "type": "file", "size": len(body),
                      "oid": hashlib.sha1(body).hexdigest()}
                     for file, body in kept[name].items()]  # fmt: skip
            if "/tree/" in path:
                return self._json(files)
            private = name in self.server.private
            return self._json({"id": name, "sha": COMMIT, "siblings": files, "private": private})
        name, _, file = path[1:].partition("/resolve/")
        file = file.partition("/")[2]
        if file not in kept.get(name, {}):
            return self._send(404, X_Error_Code="EntryNotFound")
        body = kept[name][file]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return self._send(200, body, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._send(401, X_Error_Message="Invalid username or password.")
        if self.server.dead and self.server.dead in path:
            self.close_connection = True
            return self.connection.close()
        here = f"http://{self.headers['Host']}"
        name = "/".join(path.split("/")[3:5])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.server.repositories:
                return self._send(409, json.dumps({"url": f"{here}/{name}"}).encode())
            self.server.repositories[name] = {}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(name)
            return self._json({"url": f"{here}/{name}", "name": name, "id": name})
        if "/preupload/" in path:
            files = [{"path": file["path"], "shouldIgnore": False, "uploadMode":
                      "lfs" if file["path"].endswith(self.server.large) else "regular"}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": files})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    self.server.repositories[name][value["path"]] = content
                elif line["key"] == "lfsFile":
                    value = line["value"]
                    self.server.repositories[name][value["path"]] = self.server.stored[value["oid"]]
            url = f"{here}/{name}/commit/{COMMIT}"
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{**item, "actions": {"upload": {"href": f"{here}/large/{item['oid']}"}}}
                       for item in json.loads(body)["objects"]]  # fmt: skip
            return self._json({"transfer": "basic", "objects": objects})
        return self._json({"success": True, "errors": [], "warnings": []})

    def do_PUT(self) -> None:
        """A large file, at the address that the hub named."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self._send(200)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub(("127.0.0.1", 0), Handler)
    server.repositories, server.asked, server.stored, server.private = {}, [], {}, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by plain LFS
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(
    hub: Hub,
    tiny: Path,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny, "mine")
    Path("mine/data.json").write_text('{"inputs": ["/home/me/diary.txt"]}')
    assert main(["push", "mine", "hf:me/looped", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = hub.repositories["me/looped"]
    assert printed["repository"] == "me/looped" and printed["url"].endswith("/me/looped")
    assert (printed["files"], printed["bytes"]) == (len(kept), sum(map(len, kept.values())))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= kept.keys()
    assert not any(b"diary" in body for body in kept.values()), "a path of this machine"

    kept["pytorch_model.bin"] = b"a pickle"
    capsys.readouterr()
    found = resolve_model("hf:me/looped")
    loaded = load_model(found.folder)
    assert loaded.name == "looped"
    assert loaded.model.state_dict().keys() == load_model(tiny).model.state_dict().keys()
    assert not list(found.folder.rglob("*.bin"))
    assert not any("pytorch_model" in path for path in hub.asked)
    assert main(["generate", "Call", "--model", "hf:me/looped", "--max-new-tokens", "2",
                 "--json"]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "looped" and "Fetching" not in err

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    assert download_model("hf:me/looped") == found.folder
    with pytest.raises(LooptxError, match="hf:me/other: the hub can't be reached"):
        download_model("hf:me/other")


def test_what_the_hub_refuses_is_one_line(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="hf:me/none: the hub has no such model"):
        resolve_model("hf:me/none")
    for name in ("hf:", "hf:a/b/c", "hf:../a", "hf:a b"):
        with pytest.raises(UsageError, match="hf:"):
            download_model(name)
    with pytest.raises(UsageError, match="leave out @v2"):
        push_model(tiny, "hf:me/a@v2")
    with pytest.raises(UsageError, match="give a model of the hub as hf:OWNER/NAME"):
        push_model(tiny, "me/a")
    hub.repositories["me/empty"] = {"config.json": b"{}", "model.safetensors": b"{}"}
    with pytest.raises(DataError, match="snapshots"):
        load_model(resolve_model("hf:me/empty").folder)
    assert main(["push", str(tmp_path), "hf:me/a"]) == 4
    assert main(["push", "hf:me/a", "hf:me/b"]) == 2
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(LooptxError, match=r"hf auth login.* or set HF_TOKEN"):
        push_model(tiny, "hf:me/a")


def test_large_files_and_repositories_that_are_there(
    hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.large = (".safetensors",)
    done = push_model(tiny, "hf:me/large", private=True)
    assert hub.private == {"me/large"} and len(hub.stored) == 1
    kept = hub.repositories["me/large"]
    assert kept["model.safetensors"] == (tiny / "model.safetensors").read_bytes()
    assert push_model(tiny, "hf:me/large", private=True).files == done.files == len(kept)
    push_model(tiny, "hf:me/open")
    with pytest.raises(UsageError, match="hf:me/open: a public repository of this name is there"):
        push_model(tiny, "hf:me/open", private=True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again
    for dead in ("/commit/", "/objects/batch"):
        hub.dead = dead
        with pytest.raises(LooptxError, match=r"the hub can't be reached .*check the network"):
            push_model(tiny, "hf:me/broken")
        assert hub.repositories["me/broken"] == {}, "whole or not at all"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LooptxError, match=r"the hub answers 401 .* with a token that may do this"):
        push_model(tiny, "hf:me/other")
    assert "me/other" not in hub.repositories
