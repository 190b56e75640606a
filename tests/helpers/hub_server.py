"""A server with the part of the Hugging Face Hub's interface that loading and pushing need."""

import base64
import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import pytest

TOKEN = "hf_of_the_owner"


class Repository:
    """Commits in memory.

    Attributes:
      private: whether reading requires ``TOKEN``, too.
      commits: hash -> {path: content}.
      branches, tags: name -> hash.
    """

    def __init__(self, *, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", {".gitattributes": b""})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Replace the files of a branch and return the hash of the new commit."""
        commit = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """Hash of a branch, tag or commit; None if there is none."""
        commits = {commit: commit for commit in self.commits}
        return {**commits, **self.tags, **self.branches}.get(revision)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the branch main."""
        return self.commits[self.branches["main"]]


class HubServer(http.server.ThreadingHTTPServer):
    """Server on a free port of this machine.

    Attributes:
      repositories: USER/REPOSITORY -> repository.
      requests: "METHOD path" of every request.
      damage: (path in a repository, content) -> the content that is sent, whose size is announced as that of the original.
      refusal: status and error code with which every request is answered, or None.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.damage: Callable[[str, bytes], bytes] = lambda path, content: content
        self.refusal: tuple[int, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def use_hub(server: HubServer, cache: pathlib.Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process, and in those that it starts, use a server and a cache, as the owner of its token."""
    from huggingface_hub import constants  # it has read the variables already if another test has imported it

    for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "HF_TOKEN": TOKEN}.items():
        patch.setenv(name, value)
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextlib.contextmanager
def run_hub_server() -> Iterator[HubServer]:
    """Run a server in a thread."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self):
        self._answer_request()

    do_HEAD = do_POST = do_GET

    def _answer_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {self.path}")
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.server.refusal:
            status, code = self.server.refusal
            self._send(status, {"X-Error-Code": code})
        elif self.command == "POST" and not authorized:
            self._send(401)
        elif parts == ["api", "validate-yaml"]:
            self._send_json({"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        else:
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            repository = self.server.repositories.get(name)
            if repository is None or (repository.private and not authorized):
                self._send(401, {"X-Error-Code": "RepoNotFound"})
            elif parts[0] == "api":
                self._answer_api(name, repository, parts[4:], body)
            else:
                self._resolve(repository, parts[3], "/".join(parts[4:]))

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        is_private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repositories.setdefault(name, Repository(private=bool(is_private)))
        self._send_json({"url": f"{self.server.url}/{name}"}, status)

    def _answer_api(self, name, repository, parts, body):
        action, revision = (parts or [""])[0], parts[1] if len(parts) > 1 else "main"
        if action == "branch":
            status = 409 if revision in repository.branches else 200
            repository.branches.setdefault(revision, repository.branches["main"])
            self._send_json({}, status)
            return
        commit = repository.resolve(revision)
        if commit is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
            return
        files = repository.commits[commit]
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            self._send_json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})
        elif action == "tree":
            entries = [(path, len(content), _hash_blob(content)) for path, content in files.items()]
            self._send_json([{"type": "file", "path": path, "size": size, "oid": oid} for path, size, oid in entries])
        elif action == "refs":
            kinds = {"branches": repository.branches, "tags": repository.tags, "converts": {}}
            refs = {
                kind: [{"name": ref, "ref": ref, "targetCommit": target} for ref, target in targets.items()]
                for kind, targets in kinds.items()
            }
            self._send_json(refs)
        elif action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._send_json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        elif action == "commit":
            new = dict(files)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    new[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del new[line["value"]["path"]]
            commit = repository.commit(revision, new)
            self._send_json({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self._send(404)

    def _resolve(self, repository, revision, path):
        commit = repository.resolve(revision)
        content = repository.commits.get(commit, {}).get(path)
        if content is None:
            self._send(404, {"X-Error-Code": "EntryNotFound" if commit else "RevisionNotFound"})
            return
        sent = content if self.command == "HEAD" else self.server.damage(path, content)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"ETag": f'"{_hash_blob(content)}"', "X-Repo-Commit": commit}
        self._send(206 if start else 200, headers, sent[start:])

    def _send_json(self, value, status=200):
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status, headers=None, content=b""):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Nothing is logged."""


def _hash_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
