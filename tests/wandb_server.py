"""A double of W&B's service at the HTTP boundary: a local server that the real client talks to.

Enters: run directories, as artifacts that runs have logged, and whatever runs log. Leaves: answers to what `wandb.Api`
asks in GraphQL, and files; what runs have logged, as `Logging`. It was written from what the client asks (wandb 0.31)
and the fields that its generated models need, not recorded from the service. A question that it does not know is
answered with an error, so that a client that asks another way is noticed.
"""

from __future__ import annotations

import base64
import gzip
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
class Taken:
    """An artifact that a run has logged: the bytes of its files."""

    name: str
    aliases: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    committed: bool = False


@dataclass
class Logging:
    """What one run has logged so far: its rows of history and its summary."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[Taken] = field(default_factory=list)
    complete: bool = False


@dataclass
class Double:
    """What the server knows, and what it was asked.

    `cut` names files of which only half comes, `short` those of which the connection breaks off half way, `gone` those
    that are not there; `referred` are entries that point elsewhere. While `answering` is not set, it takes whatever
    comes and never answers, as a network that stalls. `key` is the one that opens it.
    """

    runs: dict[str, str] = field(default_factory=dict)
    artifacts: list[Logged] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    referred: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""
    logging: dict[str, Logging] = field(default_factory=dict)
    views: list[Any] = field(default_factory=list)
    key: str = KEY
    turned_away: int = 0
    answering: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.answering.set()

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
        if operation == "UpsertView2":
            self.views.append(json.loads(variables["spec"]))
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
        if operation in ("RunResumeStatus", "UpsertBucket", "CreateRunFiles") or "Artifact" in operation:
            taken = self._take(operation, variables)
            if taken is not None:
                return taken
        known = (variables.get("entity"), variables.get("project")) == (ENTITY, PROJECT)
        return {"project": self._in_project(operation, variables) if known else None}

    def _take(self, operation: str, variables: dict[str, Any]) -> Any:
        """The answer to what a run asks that logs; None if it is no such question."""
        project = {"id": "1", "name": PROJECT, "entity": {"id": "1", "name": ENTITY}}
        if operation == "RunResumeStatus":
            return {"model": project | {"bucket": None}}
        if operation == "UpsertBucket":
            self.logging.setdefault(variables["name"], Logging())
            plain: dict[str, Any] = dict.fromkeys(("displayName", "description", "sweepName"))
            plain |= {"id": f"id-{variables['name']}", "name": variables["name"], "config": variables["config"]}
            return {"upsertBucket": {"bucket": plain | {"project": project, "historyLineCount": 0}, "inserted": True}}
        if operation == "CreateRunFiles":
            run = variables["run"]
            files = [{"name": name, "uploadUrl": f"{self.url}/run/{run}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        asked = variables.get("input", variables)
        if operation == "CreateArtifact":
            run = asked["runName"]
            aliases = tuple(item["alias"] for item in asked["aliases"])
            every = self.logging[run].artifacts
            every.append(Taken(asked["artifactCollectionName"], aliases))
            sequence = {"artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": {"id": f"{run}.{len(every) - 1}", "state": "PENDING"} | sequence}}
        if operation == "CreateArtifactFiles":
            edges = [
                {
                    "node": {
                        "storagePath": item["name"],
                        "uploadUrl": f"{self.url}/artifact/{item['artifactID']}/{item['name']}",
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": {"id": item["artifactID"]},
                    }
                }
                for item in asked["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            found = {"id": variables.get("artifactID", "m")}
            url = f"{self.url}/contents/{variables.get('artifactID')}"
            file = {"file": {"id": "f", "uploadUrl": url, "uploadHeaders": []}}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": found | file}}
        if operation == "CommitArtifact":
            self._taken(variables["artifactID"]).committed = True
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "0" * 32}}}
        return None

    def _taken(self, name: str) -> Taken:
        run, number = name.split(".")
        return self.logging[run].artifacts[int(number)]

    def upload(self, path: str, content: bytes) -> None:
        """Take what is put at one of the addresses that were given out."""
        kind, name, *parts = unquote(path).strip("/").split("/")
        if kind == "run":
            self.logging[name].files["/".join(parts)] = content
        elif kind == "artifact":
            self._taken(name).files["/".join(parts)] = content
        else:
            self._taken(name).manifest = json.loads(content)

    def stream(self, run: str, asked: dict[str, Any]) -> None:
        """Take lines of a run's history and summary."""
        into = self.logging[run]
        files = asked.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        # What was not answered is sent again from the same line on.
        rows = enumerate(history["content"], history["offset"])
        into.rows |= {number: json.loads(line) for number, line in rows}
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            into.summary |= json.loads(line)
        into.complete = into.complete or bool(asked.get("complete"))

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
        plain: dict[str, Any] = {
            "id": f"id-{name}",
            "name": name,
            "displayName": name,
            "state": self.runs[name],
            "projectId": "1",
        }
        plain |= dict.fromkeys(("sweepName", "group", "jobType", "commit", "description", "notes"))
        empty: dict[str, Any] = {
            "config": "{}",
            "systemMetrics": "{}",
            "summaryMetrics": "{}",
            "historyKeys": None,
            "tags": [],
        }
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
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            double.answering.wait()
            if self.path.endswith("/file_stream"):
                double.stream(self.path.split("/")[-2], json.loads(body))
                return self.reply(200, b"{}")
            if self.path != "/graphql":
                # Telemetry.
                return self.reply(200, b"")
            given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
            if given != f"api:{double.key}":
                double.turned_away += 1
                return self.reply(401, b'{"errors": [{"message": "user is not logged in"}]}')
            asked = json.loads(body)
            try:
                answer = {"data": double.answer(asked["query"], asked.get("variables") or {})}
            except Exception as error:
                answer = {"errors": [{"message": f"the double has no answer: {error!r}"}], "data": None}
            return self.reply(200, json.dumps(answer).encode())

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            double.answering.wait()
            double.upload(self.path, content)
            self.reply(200, b"")

        def do_GET(self) -> None:
            content = double.file(self.path)
            if content is None:
                return self.reply(404, b"not found")
            if double.breaks_off(self.path):
                half = content[: len(content) // 2]
                return self.reply(200, half, "application/octet-stream", len(content) - len(half))
            return self.reply(200, content, "application/octet-stream")

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Nothing: a client that lost its patience has hung up."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield {"WANDB_BASE_URL": double.url, "WANDB_API_KEY": KEY}
    finally:
        double.answering.set()
        server.shutdown()
        thread.join()
        server.server_close()
