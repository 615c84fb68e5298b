"""A server that speaks enough of the hub's protocol for the real client."""

from __future__ import annotations

import base64
import hashlib
import json
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_writer"  # may write


class Hub(ThreadingHTTPServer):
    """Enough of the hub's protocol for one file tree per repository."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict[str, object]] = []
        self.commits: list[dict[str, object]] = []
        self.status: int | None = None  # answers everything with it

    def commit(self, repository: str) -> str:
        """The id of the state of a repository."""
        files = sorted(self.repositories[repository].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Silent."""

    def answer(self, status: int, data: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def parts(self) -> list[str]:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        return path.strip("/").split("/")

    def do_GET(self) -> None:
        parts = self.parts()
        if self.server.status is not None:
            return self.answer(self.server.status)
        api = parts[0] == "api"
        user, name, _, revision, *rest = (parts[2:] if api else parts) + [""] * 3
        files = self.server.repositories.get(f"{user}/{name}")
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        commit = self.server.commit(f"{user}/{name}")
        if revision not in ("", "main", commit):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if api:
            listed = [{"rfilename": path} for path in files]
            facts = {"id": f"{user}/{name}", "sha": commit, "private": False, "siblings": listed}
            facts |= {"downloads": 0, "likes": 0, "tags": []}
            return self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
        data = files.get("/".join(rest).rstrip("/"))
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.answer(200, data, ETag=etag, X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        parts = self.parts()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if parts[1] == "validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401)
        if parts[1:] == ["repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            known = name in self.server.repositories
            self.server.created.append(wanted)
            self.server.repositories.setdefault(name, {})
            url = json.dumps({"url": f"{self.server.endpoint}/{name}"}).encode()
            return self.answer(409 if known else 200, url)
        if parts[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        assert parts[4] == "commit"
        repository = "/".join(parts[2:4])
        head, *operations = [json.loads(line)["value"] for line in body.splitlines()]
        added = {op["path"]: base64.b64decode(op["content"]) for op in operations}
        self.server.repositories[repository].update(added)
        self.server.commits.append({"message": head["summary"], "files": sorted(added)})
        commit = self.server.commit(repository)
        url = f"{self.server.endpoint}/{repository}/commit/{commit}"
        done = {"commitUrl": url, "commitOid": commit, "success": True}
        return self.answer(200, json.dumps(done).encode())
