"""A model hub on loopback: it speaks the calls that `huggingface_hub` makes, and keeps what it received."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# Some of the identifiers in https://huggingface.co/docs/hub/repositories-licenses.
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "openrail", "llama2", "gemma", "unknown", "other"}
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".model")


def card_errors(content: str) -> list[str]:
    """What the Hub refuses in a card, by https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    header = yaml.safe_load(content.split("---\n")[1])
    names = [("base_model", header.get("base_model")), *(("datasets", name) for name in header.get("datasets") or [])]
    errors = [f'"{field}" with value "{name}" is not valid.' for field, name in names if name and not is_repo(name)]
    errors += ['"license" must be one of the list'] * (header.get("license") not in LICENSES)
    errors += ['"license_name" is needed'] * (header.get("license") == "other" and "license_name" not in header)
    lists = [field for field in ("tags", "datasets") if not isinstance(header.get(field, []), list)]
    fields = ("library_name", "pipeline_tag", "model_name")
    texts = [field for field in fields if not isinstance(header.get(field, ""), str)]
    return errors + [f'"{field}" has another type' for field in lists + texts]


def is_repo(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class Hub:
    """Repositories in memory; a context manager that serves them.

    Attributes:
        repos: by name, files by path.
        commits: by name, `(message, paths)` of each.
        calls: method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[tuple[str, list[str]]]] = {}
        self.large: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.tokens: set[str] = set()
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo}{len(self.commits[repo])}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _answer(self, body=None, status=200, headers=None, head=False) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def _missing(self, code: str, head=False) -> None:
        self._answer({"error": code}, 404, {"X-Error-Code": code}, head)

    def _begin(self) -> tuple[str, bytes]:
        self.hub.calls.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        return unquote(urlparse(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        path, body = self._begin()
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repos.setdefault(repo, {})
            hub.commits.setdefault(repo, [])
            return self._answer({"url": f"{hub.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            messages = [{"message": error} for error in errors]
            return self._answer({"errors": messages, "warnings": []}, 400 if errors else 200)
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self._answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        return self._missing("EntryNotFound")

    def _commit(self, repo: str, lines: list[dict]) -> None:
        with self.hub.lock:
            files, changed, message = self.hub.repos[repo], [], ""
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                    continue
                changed.append(value["path"])
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                else:
                    files.pop(value["path"], None)
            self.hub.commits[repo].append((message, changed))
            oid = self.hub.sha(repo)
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def do_PUT(self) -> None:
        path, body = self._begin()
        oid = path.removeprefix("/large/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer({"error": "wrong content"}, 400)
        self.hub.large[oid] = body
        return self._answer()

    def do_GET(self, head: bool = False) -> None:
        path, _ = self._begin()
        hub = self.hub
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if match[1] not in hub.repos:
                return self._missing("RepoNotFound", head)
            siblings = [{"rfilename": name} for name in hub.repos[match[1]]]
            return self._answer({"id": match[1], "sha": hub.sha(match[1]), "siblings": siblings}, head=head)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            files = hub.repos.get(match[1], {})
            entries = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                       for n, b in files.items()]  # fmt: skip
            return self._answer(entries, head=head)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, _, name = match.groups()
            if repo not in hub.repos:
                return self._missing("RepoNotFound", head)
            commit = {"X-Repo-Commit": hub.sha(repo)}
            if name not in hub.repos[repo]:
                return self._answer({}, 404, {"X-Error-Code": "EntryNotFound", **commit}, head)
            data = hub.repos[repo][name]
            etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            return self._answer(data, headers={**commit, **etag}, head=head)
        return self._missing("EntryNotFound", head)

    def do_HEAD(self) -> None:
        self.do_GET(head=True)
