"""A double of W&B's public API at the HTTP boundary: a local server that the real client talks to.

Enters: run directories, as artifacts that runs have logged. Leaves: answers to what `wandb.Api` asks in GraphQL, and
files. It was written from what the client asks (wandb 0.31) and the fields that its generated models need, not recorded
from the service. A question that it does not know is answered with an error, so that a client that asks another way
is noticed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

KEY = "0123456789abcdef" * 2 + "01234567"
ENTITY, PROJECT = "acme", "doctors"


@dataclass(frozen=True)
class Logged:
    """An artifact as a run logged it, holding the files of `folder`."""

    name: str
    version: int
    run: str
    folder: Path
    type: str = "bias-audit"
    state: str = "COMMITTED"
    aliases: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return base64.b64encode(f"Artifact:{self.name}:{self.version}".encode()).decode()

    @property
    def files(self) -> dict[str, Path]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path for path in found}


@dataclass
class Double:
    """What the server knows, and what it was asked.

    `cut` names files of which only half comes, `short` those of which the connection breaks off half way, `gone` those
    that are not there; `referred` are entries that point elsewhere.
    """

    runs: dict[str, str] = field(default_factory=dict)
    artifacts: list[Logged] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    referred: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, query: str, variables: dict[str, Any]) -> Any:
        """The data of one GraphQL query."""
        operation = query.replace("#graphql", " ").split("(")[0].split("{")[0].split()[-1]
        self.asked.append(operation)
        if operation in ("Viewer", "GetDefaultEntity"):
            viewer = {"id": "u", "entity": ENTITY, "username": "u", "email": "u@example.org", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "FetchArtifactManifest":
            logged = next(a for a in self.artifacts if a.id == variables["id"])
            url = f"{self.url}/manifest/{logged.name}/{logged.version}"
            return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}
        known = (variables["entity"], variables.get("project")) == (ENTITY, PROJECT)
        return {"project": self._in_project(operation, variables) if known else None}

    def _in_project(self, operation: str, variables: dict[str, Any]) -> Any:
        if operation == "Run":
            return {"run": self._run(variables["name"])}
        if operation == "RunOutputArtifacts":
            every = [a for a in self.artifacts if a.run == variables["run"]]
            # W&B gives a page at a time.
            at = int(variables.get("cursor") or 0)
            page = every[at : at + 2]
            more = {"endCursor": str(at + len(page)), "hasNextPage": at + len(page) < len(every)}
            edges = [{"node": self._artifact(a), "cursor": ""} for a in page]
            return {"run": {"artifacts": {"totalCount": len(every), "pageInfo": self._page(more), "edges": edges}}}
        if operation == "ArtifactMembershipByName":
            logged = self._find(*variables["name"].split(":"))
            return {"artifactCollectionMembership": None if logged is None else self._membership(logged)}
        if operation == "GetArtifactMembershipFileUrls":
            logged = self._find(variables["collection"], variables["alias"])
            assert logged is not None
            edges = [
                {"node": {"__typename": "File", "name": name, "directUrl": self._url(logged, name)}}
                for name in logged.files
            ]
            files = {"pageInfo": self._page({"endCursor": None, "hasNextPage": False}), "edges": edges}
            collection = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
            return {"artifactCollection": collection}
        raise KeyError(operation)

    def _url(self, logged: Logged, name: str) -> str:
        return f"{self.url}/file/{logged.name}/{logged.version}/{name}"

    @staticmethod
    def _page(more: dict[str, Any]) -> dict[str, Any]:
        return {"__typename": "PageInfo", **more}

    def _find(self, name: str, alias: str) -> Logged | None:
        found = [a for a in self.artifacts if a.name == name and alias in (f"v{a.version}", *a.aliases)]
        return found[-1] if found else None

    def _run(self, name: str) -> Any:
        if name not in self.runs:
            return None
        plain = {"id": f"id-{name}", "name": name, "displayName": name, "state": self.runs[name], "projectId": "1"}
        plain |= dict.fromkeys(("sweepName", "group", "jobType", "commit", "description", "notes"))
        empty = {"config": "{}", "systemMetrics": "{}", "summaryMetrics": "{}", "historyKeys": None, "tags": []}
        times = {"createdAt": "2025-01-02T03:04:05Z", "heartbeatAt": "2025-01-02T03:04:05Z"}
        user = {"user": {"name": "u", "username": "u"}, "readOnly": False, "historyLineCount": 0}
        return plain | empty | times | user

    @staticmethod
    def _sequence(logged: Logged) -> dict[str, Any]:
        project = {"id": "1", "internalId": "1", "name": PROJECT, "entity": {"name": ENTITY}}
        return {"__typename": "ArtifactSequence", "name": logged.name, "project": project}

    def _artifact(self, logged: Logged) -> dict[str, Any]:
        entries = self._entries(logged)
        plain = {"__typename": "Artifact", "id": logged.id, "versionIndex": logged.version, "state": logged.state}
        plain |= dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt"))
        plain |= {"ttlDurationSeconds": -1, "ttlIsInherited": False, "tags": [], "aliases": []}
        # Each version is said to be of the same second: a clock does not tell which is the newest.
        plain |= {"createdAt": "2025-01-02T03:04:05Z", "fileCount": len(entries), "digest": "0" * 32}
        plain |= {"size": sum(entry["size"] for entry in entries.values())}
        return plain | {"artifactSequence": self._sequence(logged), "artifactType": {"name": logged.type}}

    def _membership(self, logged: Logged) -> dict[str, Any]:
        plain = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": logged.version}
        aliases = [{"__typename": "ArtifactAlias", "id": alias, "alias": alias} for alias in logged.aliases]
        its = {"artifactCollection": self._sequence(logged), "artifact": self._artifact(logged)}
        return plain | {"createdAt": "2025-01-02T03:04:05Z", "aliases": aliases} | its

    @staticmethod
    def _entries(logged: Logged) -> dict[str, dict[str, Any]]:
        contents = {name: path.read_bytes() for name, path in logged.files.items()}
        return {
            name: {"digest": base64.b64encode(hashlib.md5(content).digest()).decode(), "size": len(content)}
            for name, content in contents.items()
        }

    def file(self, path: str) -> bytes | None:
        """What lies at one of the addresses that were given out."""
        kind, name, version, *parts = unquote(path).strip("/").split("/")
        logged = self._find(name, f"v{version}")
        if logged is None:
            return None
        if kind == "manifest":
            contents = self._entries(logged)
            contents |= {name: {"digest": "x", "ref": ref, "size": 1} for name, ref in self.referred.items()}
            policy = {"storagePolicy": "wandb-storage-policy-v1", "storagePolicyConfig": {"storageLayout": "V2"}}
            return json.dumps({"version": 1, **policy, "contents": contents}).encode()
        inside = "/".join(parts)
        if inside in self.gone:
            return None
        content = logged.files[inside].read_bytes()
        return content[: len(content) // 2] if inside in self.cut else content

    def breaks_off(self, path: str) -> bool:
        return any(path.endswith("/" + name) for name in self.short)


@contextmanager
def serving(double: Double) -> Iterator[dict[str, str]]:
    """Serve `double` on a free port; gives the environment with which W&B's client finds it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, content: bytes, kind: str = "application/json", missing: int = 0) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content) + missing))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = bool(missing)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path != "/graphql":
                # Telemetry.
                return self.reply(200, b"")
            given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
            if given != f"api:{KEY}":
                return self.reply(401, b'{"errors": [{"message": "user is not logged in"}]}')
            asked = json.loads(body)
            try:
                answer = {"data": double.answer(asked["query"], asked.get("variables") or {})}
            except Exception as error:
                answer = {"errors": [{"message": f"the double has no answer: {error!r}"}], "data": None}
            return self.reply(200, json.dumps(answer).encode())

        def do_GET(self) -> None:
            content = double.file(self.path)
            if content is None:
                return self.reply(404, b"not found")
            if double.breaks_off(self.path):
                half = content[: len(content) // 2]
                return self.reply(200, half, "application/octet-stream", len(content) - len(half))
            return self.reply(200, content, "application/octet-stream")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield {"WANDB_BASE_URL": double.url, "WANDB_API_KEY": KEY}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
