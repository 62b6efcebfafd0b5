"""A server on 127.0.0.1 that speaks as much of the Hugging Face Hub's API as huggingface_hub calls here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".onnx", ".data", ".bin")


@dataclass
class Repository:
    """Files of each commit, and which commit each branch has."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit of these files alone and returns its number."""
        text = repr((sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()), branch))
        number = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[number], self.branches[branch] = dict(files), number
        return number

    def find(self, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Holds repositories and what goes wrong.

    Attributes:
        repositories: by "owner/name".
        token: that private repositories and writing ask for.
        failures: (pattern of "METHOD PATH", status, headers, error code), each used once, in order.
        cuts: file name -> how often its download ends after half of its bytes.
        requests: "METHOD PATH" of all, in order.
        raw: what every question is answered with, of a server that is no Hub.
        moves: called before the request whose "METHOD PATH" matches, once.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.token = "hf_right"
        self.failures: list[tuple[str, int, dict[str, str]]] = []
        self.cuts: dict[str, int] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.messages: list[dict[str, Any]] = []
        self.moves: list[tuple[str, Any]] = []
        self.raw = b""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()

    def downloads(self) -> list[str]:
        """Names of the files that were asked for, each once."""
        found = [re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[0-9a-f]{40}/(.+)", each) for each in self.requests]
        return sorted({match[1] for match in found if match})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Answers."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {path}"
        hub.requests.append(line)
        for place, (pattern, status, headers) in enumerate(hub.failures):
            if re.search(pattern, line):
                del hub.failures[place]
                return self._json({"error": "a failure of this test"}, status, headers)
        for place, (pattern, move) in enumerate(hub.moves):
            if re.search(pattern, line):
                del hub.moves[place]
                move()
                break
        if hub.raw:
            return self._send(hub.raw, 200, {})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path.startswith("/lfs/"):
            hub.uploads[path.removeprefix("/lfs/")] = content
            return self._json({})
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._batch(match[1], json.loads(content))
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/(.+))?)?", path):
            return self._api(match[1], match[2] or "", match[3] or "", query, content)
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            return self._file(*match.groups())
        return self._json({"error": "unknown"}, 404)

    def _allowed(self, name: str, write: bool = False) -> Repository | None:
        """The repository, after answering where it is not for this caller."""
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repository = self.hub.repositories.get(name)
        if sent and sent != self.hub.token:
            text = "Invalid credentials in Authorization header"
            self._json({"error": text}, 401, {"X-Error-Message": text})
        elif repository is None or (repository.private and not sent):
            code = 404 if sent else 401  # the Hub does not tell strangers what there is
            self._json({"error": "Repository not found"}, code, {"X-Error-Code": "RepoNotFound"})
        elif write and not sent:
            self._json({"error": "Unauthorized"}, 401)
        else:
            return repository
        return None

    def _create(self, asked: dict[str, Any]) -> None:
        if (self.headers.get("Authorization") or "") != f"Bearer {self.hub.token}":
            return self._json({"error": "Invalid username or password."}, 401)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": name}, 409)
        made = self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _api(self, name: str, verb: str, rest: str, query: dict[str, list[str]], content: bytes) -> None:
        write = self.command == "POST"
        repository = self._allowed(name, write)
        if repository is None:
            return None
        if verb == "branch":
            if rest in repository.branches:
                return self._json({"error": "exists"}, 409)
            repository.branches[rest] = repository.branches["main"]
            return self._json({})
        commit = repository.find(rest or "main")
        if commit is None:
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if verb in ("", "revision"):
            siblings = [
                {"rfilename": each, "size": len(data), "blobId": _git_oid(each, data)} | _lfs(each, data, "sha256")
                for each, data in files.items()
            ]
            return self._json(
                {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": repository.private}
            )
        if verb == "tree":
            listed = [
                {"type": "file", "path": each, "size": len(data), "oid": _git_oid(each, data)} | _lfs(each, data, "oid")
                for each, data in files.items()
            ]
            return self._json(listed)
        if verb == "preupload":
            asked = json.loads(content)["files"]
            return self._json(
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                        }
                        for each in asked
                    ]
                }
            )
        if verb == "commit":
            return self._commit(name, repository, rest, commit, query, content)
        return self._json({"error": "unknown"}, 404)

    def _commit(
        self, name: str, repository: Repository, branch: str, parent: str, query: dict[str, list[str]], content: bytes
    ) -> None:
        lines = [json.loads(line) for line in content.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            return self._json({"error": "A commit has happened since"}, 412)
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.uploads[value["oid"]]
        pull = "refs/pr/1" if query.get("create_pr") else None
        number = repository.commit(files, pull or branch)
        self.hub.messages.append(
            header | {"branch": pull or branch, "files": [each["value"]["path"] for each in lines[1:]]}
        )
        url = f"{self.hub.url}/{name}"
        return self._json(
            {
                "commitUrl": f"{url}/commit/{number}",
                "commitOid": number,
                "pullRequestUrl": f"{url}/discussions/1" if pull else None,
            }
        )

    def _batch(self, name: str, asked: dict[str, Any]) -> None:
        if self._allowed(name, write=True) is None:
            return None
        objects = []
        for each in asked["objects"]:
            action = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            objects.append(each | ({} if each["oid"] in self.hub.uploads else action))
        return self._json({"transfer": "basic", "objects": objects})

    def _file(self, name: str, revision: str, file: str) -> None:
        repository = self._allowed(name)
        if repository is None:
            return None
        commit = repository.find(revision)
        if repository.gated and not self.headers.get("Authorization"):
            return self._json({"error": "gated"}, 401, {"X-Error-Code": "GatedRepo"})
        if commit is None or file not in repository.commits[commit]:
            return self._json({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit or ""})
        data = repository.commits[commit][file]
        start = 0
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(f"{file} {asked}")
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_oid(file, data)}"')
        if file.endswith(LARGE):
            self.send_header("X-Linked-Etag", f'"{_oid(file, data)}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.hub.cuts.get(file, 0) > 0:
            self.hub.cuts[file] -= 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
            return None
        self.wfile.write(data[start:])
        return None

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, headers or {})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(name: str, data: bytes) -> str:
    """What a file's ETag is: SHA-256 of a large one, git's SHA-1 of others."""
    return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else _blob(data)


def _git_oid(name: str, data: bytes) -> str:
    if not name.endswith(LARGE):
        return _blob(data)
    sha = hashlib.sha256(data).hexdigest()
    return _blob(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n".encode())


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(name: str, data: bytes, key: str) -> dict[str, Any]:
    if not name.endswith(LARGE):
        return {}
    return {"lfs": {key: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
