"""A Hugging Face Hub on localhost, for tests that need one.

`Hub` serves, from a thread of the test process, the part of the Hub's HTTP protocol that `huggingface_hub`,
`transformers` and `datasets` speak when they create repositories, upload (small files in the commit, large ones through
Git LFS, in one or several parts), list, branch, tag, describe and download. What it does not serve answers 501 and is
kept in `Hub.unsupported`, so that a test never passes because of a request that nobody understood.

Like the Hub, it has two origins: the Hub itself (`Hub.endpoint`) and the storage that large files go to and come from
with signed URLs. The storage refuses requests that carry a token, as the real one does.

Differences that a test can notice: large files go through LFS, never Xet (`Hub.env` turns Xet off); there are no pull
requests and no discussions; `.gitignore` is not applied to uploads; and a missing repository answers an anonymous
request with the error code RepoNotFound, which the Hub leaves out, because clients fill it in for https URLs only.

Nothing here imports a Hugging Face library before `Hub.api` is called: they read their environment when imported, so it
must be possible to make a `Hub` first.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import yaml
from aiohttp import web

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_REGULAR_SIZE = 10 * 1024**2  # bytes; larger files must go through LFS
LFS_SUFFIXES = """7z arrow bin bz2 ckpt gz h5 jpg joblib model mp4 npy npz onnx parquet pkl png pt pth safetensors tar
    tgz webp xz zip zst""".split()  # noqa: SIM905
HUB_VARIABLES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")

LICENSES = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0
    lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib""".split()  # noqa: SIM905
)
PIPELINE_TAGS = frozenset(
    """any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation
    document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction
    image-segmentation image-text-to-image image-text-to-text image-text-to-video image-to-3d image-to-image
    image-to-text image-to-video keypoint-detection mask-generation multiple-choice object-detection other
    question-answering reinforcement-learning robotics sentence-similarity summarization table-question-answering
    table-to-text tabular-classification tabular-regression tabular-to-text text-classification text-generation
    text-ranking text-retrieval text-to-3d text-to-audio text-to-image text-to-speech text-to-video
    time-series-forecasting token-classification translation unconditional-image-generation video-classification
    video-text-to-text video-to-video visual-document-retrieval visual-question-answering voice-activity-detection
    zero-shot-classification zero-shot-image-classification zero-shot-object-detection""".split()  # noqa: SIM905
)


# What is stored


def git_oid(kind: str, content: bytes) -> str:
    """The id that git gives an object: `kind` is "blob", "tree" or "commit"."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class File:
    """A file in a commit: its content, or for a large one the SHA-256 under which the storage has it."""

    oid: str
    size: int
    content: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> File:
        return cls(git_oid("blob", content), len(content), content=content)

    @classmethod
    def large(cls, sha256: str, size: int) -> File:
        return cls(git_oid("blob", lfs_pointer(sha256, size)), size, sha256=sha256)

    @property
    def content_id(self) -> str:
        """What the Hub calls the file's ETag: the SHA-256 of a large file, the git id of another."""
        return self.sha256 or self.oid


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def folder_oids(tree: Mapping[str, File]) -> dict[str, str]:
    """The git id of each folder that `tree` (path -> file) implies; the root is ''."""
    content: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict, {"": {}})
    for path, file in tree.items():
        folder, _, name = path.rpartition("/")
        content[folder][name] = ("100644", file.oid)
        while folder:
            folder = folder.rpartition("/")[0]
            content[folder]
    oids = {}
    for folder in sorted(content, key=lambda name: name.count("/") + bool(name), reverse=True):
        entries = sorted(content[folder].items(), key=lambda item: item[0] + "/" * (item[1][0] == "40000"))
        oids[folder] = git_oid(
            "tree", b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in entries)
        )
        if folder:
            parent, _, name = folder.rpartition("/")
            content[parent][name] = ("40000", oids[folder])
    return oids


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository."""

    id: str
    tree: Mapping[str, File]
    parent: Commit | None
    title: str
    message: str
    author: str
    date: datetime

    @classmethod
    def make(cls, tree: Mapping[str, File], parent: Commit | None, title: str, message: str, author: str) -> Commit:
        date = datetime.now(UTC)
        signature = f"{author} <{author}@localhost> {date.timestamp():.0f} +0000"
        lines = [f"tree {folder_oids(tree)['']}", *([f"parent {parent.id}"] if parent else [])]
        lines += [f"author {signature}", f"committer {signature}", "", title, "", message]
        return cls(git_oid("commit", "\n".join(lines).encode()), tree, parent, title, message, author, date)

    def history(self) -> Iterable[Commit]:
        """This commit and its ancestors, the newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> Commit:
        """The commit that gave the file or folder at `path` its present content."""
        oid = self.tree[path].oid if path in self.tree else folder_oids(self.tree)[path]
        last = self
        for commit in self.history():
            there = commit.tree[path].oid if path in commit.tree else folder_oids(commit.tree).get(path)
            if there != oid:
                break
            last = commit
        return last


@dataclass
class Repository:
    """A model, data set or space: `kind` is "models", "datasets" or "spaces"."""

    kind: str
    id: str
    private: bool
    gated: str | bool = False
    allowed: set[str] = field(default_factory=set)  # who may read the files while it is gated
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)  # SHA-256 of the large files uploaded so far, committed or not

    def __post_init__(self) -> None:
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        tree = {".gitattributes": File.regular(attributes.encode())}
        self.advance("main", Commit.make(tree, None, "initial commit", "", "system"))

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def advance(self, branch: str, commit: Commit) -> None:
        self.commits[commit.id] = commit
        self.branches[branch] = commit

    def commit_at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or the (shortened) id of a commit names."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [commit for id, commit in self.commits.items() if id.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def head_of(self, branch: str) -> Commit:
        try:
            return self.branches[branch.removeprefix("refs/heads/")]
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {branch}", code="RevisionNotFound") from None

    def is_large(self, commit: Commit, path: str, size: int, sample: bytes) -> bool:
        """Whether the file must be uploaded through LFS."""
        attributes = commit.tree.get(".gitattributes")
        rules = [line.split() for line in ((attributes and attributes.content) or b"").decode().splitlines()]
        name = path.rpartition("/")[2]
        return (
            size > MAX_REGULAR_SIZE
            or b"\0" in sample
            or any(
                "filter=lfs" in rule[1:] and fnmatchcase(path if "/" in rule[0] else name, rule[0])
                for rule in rules
                if rule
            )
        )


@dataclass(frozen=True)
class Token:
    user: str
    role: str  # "read" or "write"
    namespaces: frozenset[str]  # the user's own name and those of the organisations


# What tests see and arrange


@dataclass
class Request:
    """A request that the Hub or its storage got; `status` is None as long as it is unanswered, or if it was dropped."""

    method: str
    path: str
    query: Mapping[str, str]
    token: Token | None = None
    status: int | None = None
    break_off: bool = False  # an arranged fault: the connection breaks off before the end of the answer
    dropped: bool = False

    @property
    def user(self) -> str | None:
        return self.token.user if self.token else None


NOTE = web.RequestKey("note", Request)


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    skip: int
    times: int | None
    status: int | None = None
    delay: float | None = None


class Refusal(Exception):
    """An error answer, in the form that the Hub gives it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        commit: str | None = None,
        body: Mapping[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit
        self.body = body or {"error": message}

    def response(self) -> web.Response:
        headers = {"X-Error-Message": self.message.splitlines()[0]}
        if self.code:
            headers["X-Error-Code"] = self.code
        if self.commit:
            headers["X-Repo-Commit"] = self.commit
        return web.json_response(self.body, status=self.status, headers=headers)


class Hub:
    """A Hub on localhost. Its port is taken when it is made, and answers from `start()` to `stop()`.

    Attributes:
        endpoint: URL for HF_ENDPOINT or `endpoint=`.
        requests: every request so far, in the order of arrival.
        page_size: entries per page of a listing; make it small to see a client follow the pages.
        part_size: bytes per part of a large upload, or None to take each in one part.
    """

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="hub-"))
        self._sockets = [_reserve_port(), _reserve_port()]
        self.endpoint, self._storage = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in self._sockets)
        self._key = secrets.token_bytes(16)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self.reset()

    # Life

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> Hub:
        """Serve until `stop()`. A Hub that runs already is left alone."""
        if not self._thread:
            ready = threading.Event()
            self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="hub", daemon=True)
            self._thread.start()
            if not ready.wait(30):
                raise RuntimeError("The test Hub did not start within 30 s.")
        return self

    def stop(self) -> None:
        """End the server, and remove its files. It cannot be started again."""
        if self._thread and self._loop:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)
        for reserved in self._sockets:
            reserved.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> Hub:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget users, repositories, faults and requests, and restore the attributes."""
        self._tokens: dict[str, Token] = {}
        self._repositories: dict[tuple[str, str], Repository] = {}
        self.page_size: int | None = None
        self.part_size: int | None = None
        self.forget()
        for folder in ("objects", "parts"):
            shutil.rmtree(self._root / folder, ignore_errors=True)
            (self._root / folder).mkdir()

    def forget(self) -> None:
        """Forget the requests so far, and the faults that have not happened yet."""
        self.requests: list[Request] = []
        self._faults: list[Fault] = []

    # Who there is, and what they may do

    def add_user(self, name: str, *, token: str, role: str = "write", organizations: Iterable[str] = ()) -> str:
        """Make `token` a token of user `name`, for "read" or for "write", and return it. A user may have several."""
        if role not in ("read", "write"):
            raise ValueError(f"A token's role is 'read' or 'write', not {role!r}.")
        self._tokens[token] = Token(name, role, frozenset({name, *organizations}))
        return token

    def gate(self, repo_id: str, *, repo_type: str = "model", allow: Iterable[str] = ()) -> None:
        """Let only the owner and the users in `allow` read the repository's files."""
        repository = self._repository(repo_id, repo_type)
        repository.gated, repository.allowed = "manual", set(allow)

    # What is stored

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """The content of every file of a repository, by path."""
        tree = self._repository(repo_id, repo_type).commit_at(revision).tree
        return {
            path: file.content if file.content is not None else (self._root / "objects" / str(file.sha256)).read_bytes()
            for path, file in sorted(tree.items())
        }

    def large_files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> set[str]:
        """Paths of the files that were uploaded through LFS."""
        tree = self._repository(repo_id, repo_type).commit_at(revision).tree
        return {path for path, file in tree.items() if file.sha256}

    def _repository(self, repo_id: str, repo_type: str) -> Repository:
        try:
            return self._repositories[f"{repo_type}s", repo_id]
        except KeyError:
            known = ", ".join(f"{kind}/{id}" for kind, id in self._repositories) or "none"
            raise KeyError(f"No {repo_type} {repo_id!r} on the test Hub. Repositories: {known}.") from None

    # What was asked

    def matching(self, method: str, path: str) -> list[Request]:
        """Requests so far with that method ("*" for any) and a path in which the regular expression is found."""
        return [r for r in list(self.requests) if method in ("*", r.method) and re.search(path, r.path)]

    def downloads(self, repo_id: str, *, repo_type: str = "model") -> list[str]:
        """Paths of the repository's files whose content was asked for, in that order, once for each request."""
        url_path = repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"
        found = []
        for request in list(self.requests):
            if request.method == "GET" and request.status in (200, 206, None):
                if request.path.startswith("/objects/") and request.query.get("repo") == url_path:
                    found.append(request.query["path"])
                elif match := re.fullmatch(rf"/{re.escape(url_path)}/resolve/[^/]+/(.+)", request.path):
                    found.append(match[1])
        return found

    @property
    def unsupported(self) -> list[Request]:
        """Requests that this Hub does not know how to answer."""
        return [request for request in list(self.requests) if request.status == 501]

    def wait_for(self, method: str, path: str, timeout: float = 30) -> Request:
        """Wait until such a request (see `matching`) arrives. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := self.matching(method, path):
                return found[-1]
            time.sleep(0.01)
        raise TimeoutError(f"No {method} request for {path!r} within {timeout} s.")

    # What goes wrong

    def fail_next(
        self, method: str, path: str, *, status: int | None = None, skip: int = 0, times: int | None = 1
    ) -> None:
        """Make the next such requests (see `matching`) fail.

        Args:
            method: for example "PUT", or "*" for any.
            path: regular expression; large files are at "/objects/" (or "/parts/") of the storage.
            status: the answer to give; None breaks the connection off, halfway through the body if there is one.
            skip: how many such requests to let through first.
            times: how many to fail; None for all.
        """
        self._faults.append(Fault(method, re.compile(path), skip, times, status=status))

    def delay_next(self, method: str, path: str, seconds: float, *, skip: int = 0, times: int | None = 1) -> None:
        """Make the next such requests (see `fail_next`) wait for `seconds` before they are answered."""
        self._faults.append(Fault(method, re.compile(path), skip, times, delay=seconds))

    def _next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self._faults:
            if fault.method in ("*", method) and fault.path.search(path) and fault.times != 0:
                if fault.skip:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    # How to use it

    def api(self, token: str | None = None) -> HfApi:
        """A client in this process; anonymous without a token."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=token or False)

    def new_folder(self) -> Path:
        """An empty folder that lives as long as the Hub."""
        return Path(tempfile.mkdtemp(dir=self._root))

    def env(self, *, token: str | None = None, home: str | Path | None = None) -> dict[str, str]:
        """A whole environment for a process that is to know no Hub but this one.

        Args:
            token: for HF_TOKEN; anonymous without one.
            home: for HF_HOME, where the caches are; by default a new and empty folder.
        """
        env = {name: value for name, value in os.environ.items() if not name.startswith(HUB_VARIABLES)}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.new_folder()),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # data sets are counted at an address of its own
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # done by a space, at an address of its own
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        if token:
            env["HF_TOKEN"] = token
        return env

    def run_python(
        self,
        code: str,
        *,
        token: str | None = None,
        home: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        python: str | Path = sys.executable,
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run `code` (dedented) in a Python process that uses this Hub, in an empty working directory.

        Args:
            token, home: see `env`.
            env: further variables.
            python: the interpreter, for example of another virtual environment.
            timeout: seconds until subprocess.TimeoutExpired.
            check: raise AssertionError, with all that was written, if the process fails.
        """
        folder = self.new_folder()
        script = folder / "script.py"
        script.write_text(textwrap.dedent(code), encoding="utf-8")
        done = subprocess.run(
            [str(python), str(script)],
            cwd=folder,
            env=self.env(token=token, home=home) | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"Exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    # The server

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        runners = []
        for application, reserved in zip((self._hub_app(), self._storage_app()), self._sockets, strict=True):
            application.on_response_prepare.append(_note_status)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2, handler_cancellation=True)
            await runner.setup()
            await web.SockSite(runner, reserved).start()
            runners.append(runner)
        ready.set()
        await self._stop.wait()
        for runner in runners:
            await runner.cleanup()

    def _hub_app(self) -> web.Application:
        app = web.Application(middlewares=[self._observe, self._authenticate], client_max_size=0)
        repo = "{repo:[^/]+(?:/[^/]+)?}"
        api = "/api/{kind:models|datasets|spaces}"
        for method, path, handler in [
            ("GET", "/api/whoami-v2", self._whoami),
            ("GET", "/api/agent-harnesses", self._agent_harnesses),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("POST", "/api/repos/create", self._create_repo),
            ("DELETE", "/api/repos/delete", self._delete_repo),
            ("GET", api, self._list_repos),
            ("PUT", f"{api}/{repo}/settings", self._settings),
            ("GET", f"{api}/{repo}/auth-check{{write:(?:/write)?}}", self._auth_check),
            ("GET", f"{api}/{repo}/refs", self._refs),
            ("POST", f"{api}/{repo}/branch/{{name}}", self._create_branch),
            ("DELETE", f"{api}/{repo}/branch/{{name}}", self._delete_branch),
            ("POST", f"{api}/{repo}/tag/{{revision}}", self._create_tag),
            ("DELETE", f"{api}/{repo}/tag/{{name}}", self._delete_tag),
            ("GET", f"{api}/{repo}/commits/{{revision}}", self._commits),
            ("GET", f"{api}/{repo}/tree/{{revision}}{{path:(?:/.*)?}}", self._tree),
            ("POST", f"{api}/{repo}/paths-info/{{revision}}", self._paths_info),
            ("POST", f"{api}/{repo}/preupload/{{revision}}", self._preupload),
            ("POST", f"{api}/{repo}/commit/{{revision}}", self._commit),
            ("GET", f"{api}/{repo}/revision/{{revision}}", self._info),
            ("GET", f"{api}/{repo}", self._info),
            ("POST", f"/{{kind:datasets|spaces}}/{repo}.git/info/lfs/objects/{{what:batch|verify}}", self._lfs),
            ("POST", f"/{repo}.git/info/lfs/objects/{{what:batch|verify}}", self._lfs),
            ("GET", f"/{{kind:datasets|spaces}}/{repo}/resolve/{{revision}}/{{path:.+}}", self._resolve),
            ("GET", f"/{repo}/resolve/{{revision}}/{{path:.+}}", self._resolve),
            ("*", "/{path:.*}", self._unsupported),
        ]:
            app.router.add_route(method, path, handler)
            if method == "GET":
                app.router.add_route("HEAD", path, handler)
        return app

    def _storage_app(self) -> web.Application:
        app = web.Application(middlewares=[self._observe, self._check_signature], client_max_size=0)
        for method, path, handler in [
            ("PUT", "/objects/{sha256}", self._put_object),
            ("GET", "/objects/{sha256}", self._get_object),
            ("HEAD", "/objects/{sha256}", self._get_object),
            ("PUT", "/parts/{sha256}/{number}", self._put_part),
            ("POST", "/parts/{sha256}", self._join_parts),
            ("*", "/{path:.*}", self._unsupported),
        ]:
            app.router.add_route(method, path, handler)
        return app

    async def _unsupported(self, request: web.Request) -> web.Response:
        raise Refusal(501, f"The test Hub does not implement {request.method} {request.path}")

    @web.middleware
    async def _observe(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Note the request, let the arranged faults happen, and put refusals in the Hub's form."""
        note = request[NOTE] = Request(request.method, request.path, dict(request.query))
        self.requests.append(note)
        fault = self._next_fault(note.method, note.path)
        if fault and fault.delay:
            await asyncio.sleep(fault.delay)
        try:
            if fault and fault.status:
                raise Refusal(fault.status, "This request was made to fail")
            if fault and not fault.delay:
                if request.can_read_body:
                    await request.content.readexactly((request.content_length or 0) // 2)
                    return _drop(request)
                note.break_off = True  # `_send` does so halfway
            response = await handler(request)
        except Refusal as refusal:
            response = refusal.response()
        if note.break_off and not response.prepared:
            return _drop(request)
        return response

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme and (scheme.lower() != "bearer" or token not in self._tokens):
            raise Refusal(401, "Invalid credentials in Authorization header")
        request[NOTE].token = self._tokens.get(token)
        return await handler(request)

    # Who may do what

    def _find(self, request: web.Request, *, write: bool = False, content: bool = False) -> Repository:
        """The repository that the URL names, if the request may see it (and write it, or read its files)."""
        kind, repo_id = request.match_info.get("kind", "models"), request.match_info["repo"]
        repository, token = self._repositories.get((kind, repo_id)), request[NOTE].token
        if repository is None or (repository.private and (not token or repository.owner not in token.namespaces)):
            if token:
                raise Refusal(404, "Repository not found", code="RepoNotFound")
            raise Refusal(401, "Invalid username or password.", code="RepoNotFound")
        owned = token and repository.owner in token.namespaces
        if write:
            if not token:
                raise Refusal(401, "Invalid username or password.")
            if not owned or token.role != "write":
                raise Refusal(403, f"Forbidden: you have no write access to {kind}/{repo_id} with this token")
        if content and repository.gated and not owned:
            if not token:
                raise Refusal(
                    401, f"Access to {kind}/{repo_id} is restricted. You must be authenticated.", code="GatedRepo"
                )
            if token.user not in repository.allowed:
                message = f"Access to {kind}/{repo_id} is restricted and you are not in the authorized list."
                raise Refusal(403, message, code="GatedRepo")
        return repository

    def _may_write_to(self, request: web.Request, namespace: str, what: str) -> None:
        token = request[NOTE].token
        if not token:
            raise Refusal(401, "Invalid username or password.")
        if token.role != "write" or namespace not in token.namespaces:
            raise Refusal(403, f'You don\'t have the rights to {what} under the namespace "{namespace}"')

    async def _whoami(self, request: web.Request) -> web.Response:
        token = request[NOTE].token
        if not token:
            raise Refusal(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name} for name in sorted(token.namespaces - {token.user})]
        return web.json_response(
            {
                "type": "user",
                "id": token.user,
                "name": token.user,
                "fullname": token.user,
                "orgs": organizations,
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": token.role}},
            }
        )

    async def _auth_check(self, request: web.Request) -> web.Response:
        self._find(request, write=bool(request.match_info["write"]), content=True)
        return web.json_response({})

    async def _agent_harnesses(self, request: web.Request) -> web.Response:
        return web.json_response({"standardEnvVars": [], "harnesses": {}})

    # Repositories

    async def _create_repo(self, request: web.Request) -> web.Response:
        wish = await request.json()
        repo_type, name = wish.get("type") or "model", wish["name"]
        namespace = wish.get("organization") or (request[NOTE].user or "")
        self._may_write_to(request, namespace, f"create a {repo_type}")
        if not re.fullmatch(r"\w(?:[\w.-]{0,94}\w)?", name) or "--" in name or ".." in name or name.endswith(".git"):
            raise Refusal(400, f"Invalid repository name: {name}")
        repo_id, kind = f"{namespace}/{name}", f"{repo_type}s"
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        existing = self._repositories.get((kind, repo_id))
        repository = existing or Repository(kind, repo_id, private)
        about = {"url": f"{self.endpoint}/{repository.url_path}", "name": repo_id, "id": repo_id}
        if existing:
            message = f"You already created this {repo_type} repo"
            raise Refusal(409, message, body={"error": message, **about})
        self._repositories[kind, repo_id] = repository
        return web.json_response(about)

    async def _delete_repo(self, request: web.Request) -> web.Response:
        wish = await request.json()
        namespace = wish.get("organization") or (request[NOTE].user or "")
        key = f"{wish.get('type') or 'model'}s", f"{namespace}/{wish['name']}"
        self._may_write_to(request, namespace, "delete a repository")
        if key not in self._repositories:
            raise Refusal(404, "Repository not found", code="RepoNotFound")
        del self._repositories[key]
        return web.json_response({})

    async def _settings(self, request: web.Request) -> web.Response:
        repository, wish = self._find(request, write=True), await request.json()
        if "visibility" in wish or "private" in wish:
            repository.private = wish.get("visibility") == "private" or bool(wish.get("private"))
        if "gated" in wish:
            repository.gated = wish["gated"]
        return web.json_response({"private": repository.private, "gated": repository.gated})

    async def _list_repos(self, request: web.Request) -> web.Response:
        query, token = request.query, request[NOTE].token
        found = []
        for (kind, _), repository in self._repositories.items():
            if kind != request.match_info["kind"]:
                continue
            if repository.private and (not token or repository.owner not in token.namespaces):
                continue
            info = self._describe(repository, repository.branches["main"])
            if (
                query.get("author", repository.owner) == repository.owner
                and query.get("search", "").lower() in repository.id.lower()
                and query.get("pipeline_tag", info.get("pipeline_tag")) == info.get("pipeline_tag")
                and set(query.getall("filter", [])) <= set(info["tags"])
            ):
                if query.get("full", "").lower() != "true":
                    del info["siblings"]
                found.append(info)
        if query.get("sort") in ("lastModified", "createdAt"):
            found.sort(key=lambda info: info[query["sort"]], reverse=True)
        return self._page(request, found)

    async def _info(self, request: web.Request) -> web.Response:
        repository = self._find(request)
        commit = repository.commit_at(request.match_info.get("revision", "main"))
        info = self._describe(repository, commit, with_blobs=request.query.get("blobs", "").lower() == "true")
        if wanted := {name for key in ("expand", "expand[]") for name in request.query.getall(key, [])}:
            info = {name: value for name, value in info.items() if name in {*wanted, "id"}}
        return _json(info)

    def _describe(self, repository: Repository, commit: Commit, with_blobs: bool = False) -> dict[str, Any]:
        card, _ = read_card(_text(commit.tree.get("README.md")))
        card = card if isinstance(card, dict) else {}
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.tree.items()):
            siblings.append({"rfilename": path})
            if with_blobs:
                siblings[-1] |= {"size": file.size, "blobId": file.oid}
                if file.sha256:
                    pointer = len(lfs_pointer(file.sha256, file.size))
                    siblings[-1]["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer}
        first = list(commit.history())[-1]
        info = {
            "id": repository.id,
            "author": repository.owner,
            "sha": commit.id,
            "lastModified": _date(commit.date),
            "createdAt": _date(first.date),
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "cardData": card,
            "siblings": siblings,
            "usedStorage": sum(file.size for file in commit.tree.values()),
        }
        tags = [str(tag) for tag in _list(card.get("tags"))]
        if repository.kind == "models":
            config = _parsed_json(_text(commit.tree.get("config.json")))
            library = card.get("library_name") or ("transformers" if "model_type" in config else None)
            info |= {"modelId": repository.id, "library_name": library, "pipeline_tag": card.get("pipeline_tag")}
            info["config"] = {key: config[key] for key in ("architectures", "model_type", "auto_map") if key in config}
            info["model-index"] = card.get("model-index")
            tags += [tag for tag in (library, card.get("pipeline_tag"), config.get("model_type")) if tag]
            tags += ["custom_code"] * ("auto_map" in config)
        for key in ("license", "language", "datasets", "base_model", "task_categories", "size_categories"):
            prefix = {"datasets": "dataset"}.get(key, key)
            tags += [f"{prefix}:{value}" for value in _list(card.get(key))]
        info["tags"] = list(dict.fromkeys([*tags, "region:us"]))
        return info

    async def _validate_yaml(self, request: web.Request) -> web.Response:
        wish = await request.json()
        errors, warnings = check_card(wish["content"], wish.get("repoType", "model"))
        answer = {
            key: [{"message": text} for text in texts] for key, texts in (("errors", errors), ("warnings", warnings))
        }
        if errors:
            raise Refusal(400, "Invalid metadata in README.md", body=answer)
        return web.json_response(answer)

    # Branches, tags, history

    async def _refs(self, request: web.Request) -> web.Response:
        repository = self._find(request)

        def listed(names: Mapping[str, Commit], prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": c.id} for n, c in names.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        return web.json_response({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    async def _create_branch(self, request: web.Request) -> web.Response:
        repository, name = self._find(request, write=True), request.match_info["name"]
        wish = await request.json() if request.can_read_body else {}
        start = repository.commit_at(wish.get("startingPoint") or "main")
        if name.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {name}")
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.branches[name] = start
        return web.json_response({}, status=201)

    async def _delete_branch(self, request: web.Request) -> web.Response:
        repository, name = self._find(request, write=True), request.match_info["name"]
        repository.head_of(name)
        if name == "main":
            raise Refusal(403, "The branch main cannot be deleted")
        del repository.branches[name]
        return web.json_response({})

    async def _create_tag(self, request: web.Request) -> web.Response:
        repository, wish = self._find(request, write=True), await request.json()
        commit = repository.commit_at(request.match_info["revision"])
        if wish["tag"] in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {wish['tag']}")
        repository.tags[wish["tag"]] = commit
        return web.json_response({}, status=201)

    async def _delete_tag(self, request: web.Request) -> web.Response:
        repository, name = self._find(request, write=True), request.match_info["name"]
        if repository.tags.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", code="RevisionNotFound")
        return web.json_response({})

    async def _commits(self, request: web.Request) -> web.Response:
        history = self._find(request).commit_at(request.match_info["revision"]).history()
        return self._page(
            request,
            [
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": commit.message,
                    "date": _date(commit.date),
                    "authors": [{"user": commit.author}],
                }
                for commit in history
            ],
        )

    # Listings

    async def _tree(self, request: web.Request) -> web.Response:
        commit = self._find(request).commit_at(request.match_info["revision"])
        root = request.match_info["path"].strip("/")
        recursive, expand = (request.query.get(key, "").lower() == "true" for key in ("recursive", "expand"))
        oids = folder_oids(commit.tree)
        if root not in oids and root not in commit.tree:
            raise Refusal(404, f'"{root}" does not exist on "{commit.id}"', code="EntryNotFound", commit=commit.id)
        prefix = f"{root}/" if root else ""
        paths = [root] if root in commit.tree else [p for p in [*oids, *commit.tree] if p.startswith(prefix) and p]
        paths = [path for path in paths if recursive or "/" not in path[len(prefix) :]]
        return self._page(
            request, [_entry(commit, path, oids, expand) for path in sorted(paths)], 50 if expand else 1000
        )

    async def _paths_info(self, request: web.Request) -> web.Response:
        commit = self._find(request).commit_at(request.match_info["revision"])
        if request.content_type == "application/json":
            wish = await request.json()
            paths, expand = wish["paths"], bool(wish.get("expand"))
        else:
            form = await request.post()
            paths = [str(path) for path in form.getall("paths")]
            expand = str(form.get("expand", "")).lower() == "true"
        oids = folder_oids(commit.tree)
        known = [path.strip("/") for path in paths if path.strip("/") in commit.tree or path.strip("/") in oids]
        return _json([_entry(commit, path, oids, expand) for path in known])

    def _page(self, request: web.Request, entries: list[Any], size: int = 1000) -> web.Response:
        """One page of `entries`, with a link to the next one."""
        size = min(self.page_size or size, int(request.query.get("limit", size)))
        start = int(request.query.get("cursor", 0))
        response = _json(entries[start : start + size])
        if start + size < len(entries):
            url = request.url.update_query(cursor=start + size)
            response.headers["Link"] = f'<{self.endpoint}{url.raw_path_qs}>; rel="next"'
        return response

    # Uploads

    async def _preupload(self, request: web.Request) -> web.Response:
        repository = self._find(request, write=True)
        commit = repository.head_of(request.match_info["revision"])
        answers: list[dict[str, Any]] = []
        for file in (await request.json())["files"]:
            large = repository.is_large(commit, file["path"], file["size"], base64.b64decode(file.get("sample", "")))
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if present := commit.tree.get(file["path"]):
                answers[-1]["oid"] = present.content_id
        return web.json_response({"files": answers})

    async def _lfs(self, request: web.Request) -> web.Response:
        repository, wish = self._find(request, write=True), await request.json()
        if request.match_info["what"] == "verify":
            stored = self._root / "objects" / wish["oid"]
            if wish["oid"] not in repository.objects or stored.stat().st_size != wish["size"]:
                raise Refusal(404, f"The object {wish['oid']} has not been uploaded in full")
            return web.json_response({})
        if wish.get("operation") != "upload":
            raise Refusal(501, f"The test Hub does not implement LFS {wish.get('operation')}")
        if "ref" in wish:
            repository.head_of(wish["ref"]["name"])
        objects = []
        for blob in wish["objects"]:
            sha256, size = blob["oid"], blob["size"]
            if not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise Refusal(400, f"Not a SHA-256: {sha256}")
            objects.append({"oid": sha256, "size": size})
            if sha256 in repository.objects:
                continue
            upload: dict[str, Any] = {"href": self._signed("PUT", f"/objects/{sha256}", repo=repository.url_path)}
            if self.part_size and size > self.part_size:
                parts = {
                    f"{number:05}": self._signed("PUT", f"/parts/{sha256}/{number}")
                    for number in range(1, -(-size // self.part_size) + 1)
                }
                upload = {
                    "href": self._signed("POST", f"/parts/{sha256}", repo=repository.url_path),
                    "header": {"chunk_size": str(self.part_size), **parts},
                }
            verify = {"href": f"{self.endpoint}/{repository.url_path}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return web.json_response({"transfer": "multipart" if self.part_size else "basic", "objects": objects})

    async def _commit(self, request: web.Request) -> web.Response:
        repository = self._find(request, write=True)
        lines = [json.loads(line) for line in (await request.read()).splitlines() if line.strip()]
        if request.query.get("create_pr"):
            raise Refusal(501, "The test Hub does not implement pull requests")
        branch = request.match_info["revision"].removeprefix("refs/heads/")
        parent = repository.head_of(branch)
        header: dict[str, str] = next((line["value"] for line in lines if line["key"] == "header"), {})
        if not header.get("summary"):
            raise Refusal(400, "A commit needs a summary")
        if not parent.id.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(parent.tree)
        for line in lines:
            if line["key"] != "header":
                self._apply(repository, tree, line["key"], line["value"])
        if "README.md" in tree and tree["README.md"] != parent.tree.get("README.md"):
            errors, _ = check_card(_text(tree["README.md"]), repository.kind.removesuffix("s"))
            if errors:
                raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        author = request[NOTE].user or ""
        commit = Commit.make(tree, parent, header["summary"], header.get("description", ""), author)
        repository.advance(branch, commit)
        url = f"{self.endpoint}/{repository.url_path}/commit/{commit.id}"
        return web.json_response({"success": True, "commitUrl": url, "commitOid": commit.id, "hookOutput": ""})

    def _apply(self, repository: Repository, tree: dict[str, File], operation: str, value: dict[str, Any]) -> None:
        """Do to `tree` what a line of a commit asks for."""
        path = value["path"]
        if operation == "deletedFolder":
            below = [name for name in tree if name.startswith(path.rstrip("/") + "/")]
            if not below:
                raise Refusal(404, f"A folder with this name doesn't exist: {path}", code="EntryNotFound")
            for name in below:
                del tree[name]
            return
        if not path or path != path.strip("/") or {"", ".", "..", ".git"} & set(path.split("/")):
            raise Refusal(400, f"Invalid path: {path!r}")
        if operation == "deletedFile":
            if tree.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
        elif operation == "file":
            content = (
                base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
            )
            if len(content) > MAX_REGULAR_SIZE:
                raise Refusal(400, f"{path} is larger than {MAX_REGULAR_SIZE} bytes and must be uploaded through LFS")
            tree[path] = File.regular(content)
        elif operation == "lfsFile":
            if value["oid"] not in repository.objects:
                raise Refusal(400, f'LFS pointer pointed to a file that does not exist in "{path}"')
            tree[path] = File.large(value["oid"], (self._root / "objects" / value["oid"]).stat().st_size)
        else:
            raise Refusal(501, f"The test Hub does not implement the commit operation {operation}")

    # Downloads

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        repository, path = self._find(request, content=True), request.match_info["path"]
        commit = repository.commit_at(request.match_info["revision"])
        file = commit.tree.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", code="EntryNotFound", commit=commit.id)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "ETag": f'"{file.content_id}"'}
        if file.content is not None:
            return await _send(request, file.content, headers)
        headers |= {"X-Linked-Etag": f'"{file.content_id}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = self._signed("GET", f"/objects/{file.sha256}", repo=repository.url_path, path=path)
        return web.Response(status=302, headers=headers)

    # The storage

    def _signed(self, method: str, at: str, **query: str) -> str:
        return f"{self._storage}{at}?{urlencode({**query, 'signature': self._signature(method, at, query)})}"

    def _signature(self, method: str, path: str, query: Mapping[str, str]) -> str:
        signed = json.dumps([method, path, sorted(query.items())])
        return hmac.new(self._key, signed.encode(), hashlib.sha256).hexdigest()

    @web.middleware
    async def _check_signature(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if "Authorization" in request.headers:
            raise Refusal(400, "A signed URL takes no Authorization header: the client sent a token off the Hub")
        query = dict(request.query)
        given = query.pop("signature", "")
        method = "GET" if request.method == "HEAD" else request.method
        if not hmac.compare_digest(given, self._signature(method, request.path, query)):
            raise Refusal(403, "The signature does not match")
        return await handler(request)

    async def _put_object(self, request: web.Request) -> web.Response:
        return self._store(request, await request.read())

    async def _put_part(self, request: web.Request) -> web.Response:
        content = await request.read()
        self._part(request, request.match_info["number"]).write_bytes(content)
        return web.Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    async def _join_parts(self, request: web.Request) -> web.Response:
        content = b""
        for wish in (await request.json())["parts"]:
            part = self._part(request, wish["partNumber"])
            if not part.exists() or hashlib.md5(part.read_bytes()).hexdigest() != wish["etag"].strip('"'):
                raise Refusal(400, f"Part {wish['partNumber']} is missing or differs from its ETag")
            content += part.read_bytes()
        return self._store(request, content)

    def _part(self, request: web.Request, number: str | int) -> Path:
        return self._root / "parts" / f"{request.match_info['sha256']}.{int(number)}"

    def _store(self, request: web.Request, content: bytes) -> web.Response:
        """Keep `content` as the object that the URL names, if that is what it is."""
        sha256 = request.match_info["sha256"]
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refusal(400, f"The content received is not that of {sha256}")
        (self._root / "objects" / sha256).write_bytes(content)
        for repository in self._repositories.values():
            if repository.url_path == request.query["repo"]:
                repository.objects.add(sha256)
        return web.json_response({"ok": True})

    async def _get_object(self, request: web.Request) -> web.StreamResponse:
        content = (self._root / "objects" / request.match_info["sha256"]).read_bytes()
        return await _send(request, content, {"Accept-Ranges": "bytes"})


# Answers


def _reserve_port() -> socket.socket:
    """A socket on a free port of localhost: connections are refused until a server listens on it."""
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    return reserved


async def _note_status(request: web.Request, response: web.StreamResponse) -> None:
    """Before the client gets the answer, so that a test that has it finds the status noted."""
    if not request[NOTE].dropped:
        request[NOTE].status = response.status
    response.headers["X-Request-Id"] = secrets.token_hex(8)


def _drop(request: web.Request) -> web.Response:
    request[NOTE].dropped = True
    if request.transport:
        request.transport.abort()
    return web.Response()  # never sent


async def _send(request: web.Request, content: bytes, headers: dict[str, str]) -> web.StreamResponse:
    """Answer with `content` or the range of it that was asked for; halfway only, if the request is to be dropped."""
    try:
        wanted = request.http_range
        start, stop, _ = wanted.indices(len(content))
        if wanted.start is not None and start >= len(content):
            raise ValueError
    except ValueError:
        response: web.StreamResponse = web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        return response
    response = web.StreamResponse(headers=headers)
    if wanted.start is not None or wanted.stop is not None:
        response.set_status(206)
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    response.content_type = "application/octet-stream"
    response.content_length = stop - start
    await response.prepare(request)
    if request.method != "HEAD":
        if request[NOTE].break_off:
            await response.write(content[start : start + (stop - start) // 2])
            if request.transport:
                request.transport.close()  # after what has been written, unlike abort()
            return response
        await response.write(content[start:stop])
    return response


def _json(value: Any) -> web.Response:
    return web.Response(text=json.dumps(value, default=str), content_type="application/json")


def _date(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03}Z"


def _entry(commit: Commit, path: str, oids: Mapping[str, str], expand: bool) -> dict[str, Any]:
    """A file or folder as listings give it."""
    file = commit.tree.get(path)
    if file is None:
        entry: dict[str, Any] = {"type": "directory", "oid": oids[path], "size": 0, "path": path}
    else:
        entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.sha256:
            pointer = len(lfs_pointer(file.sha256, file.size))
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer}
    if expand:
        last = commit.last_change(path)
        entry["lastCommit"] = {"id": last.id, "title": last.title, "date": _date(last.date)}
    return entry


def _text(file: File | None) -> str:
    return (file.content or b"").decode("utf-8", "replace") if file else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _parsed_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# Cards


def read_card(text: str) -> tuple[Any, str | None]:
    """The metadata at the head of a README (None if there is none), and what is wrong with its YAML."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n?---\s*(?:\n|$)", text, re.DOTALL)
    if not match:
        return None, None
    try:
        return yaml.safe_load(match[1]), None
    except yaml.YAMLError as error:
        return None, f"Invalid YAML: {error}"


def check_card(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a README's metadata, after the Hub's documentation of model and data set cards."""
    card, problem = read_card(text)
    if problem:
        return [problem], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["metadata must be an object"], []
    errors, warnings = [], []

    def need(holds: bool, message: str) -> None:
        if not holds:
            errors.append(message)

    for key in ("tags", "language", "license", "datasets", "metrics", "base_model", "task_categories", "task_ids"):
        for value in _list(card.get(key)):
            need(isinstance(value, str), f'"{key}" must be a string or a list of strings, got {value!r}')
    for key in ("pipeline_tag", "library_name", "pretty_name", "license_name", "license_link"):
        need(isinstance(card.get(key, ""), str), f'"{key}" must be a string')
    for name in _list(card.get("license")):
        need(name in LICENSES, f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for code in _list(card.get("language")):
        known = isinstance(code, str) and re.fullmatch(r"[a-z]{2,3}(?:-[A-Za-z]+)?|multilingual|code", code)
        need(bool(known), f'"language" must be an ISO 639 code, got {code!r}')
    for key in ("datasets", "base_model"):
        for name in _list(card.get(key)):
            need(
                isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name)),
                f'"{key}" must be ids of repositories, got {name!r}',
            )
    tag = card.get("pipeline_tag")
    if repo_type == "model" and isinstance(tag, str) and tag not in PIPELINE_TAGS:
        official = ", ".join(sorted(PIPELINE_TAGS))
        warnings.append(f'The pipeline tag "{tag}" is not in the official list: {official}')
    _check_model_index(card.get("model-index"), need)
    _check_configs(card.get("configs"), need)
    return errors, warnings


def _check_model_index(index: Any, need: Any) -> None:
    if index is None:
        return
    need(isinstance(index, list), '"model-index" must be an array')
    for i, model in enumerate(_list(index)):
        at = f"model-index[{i}]"
        model = model if isinstance(model, dict) else {}
        need(isinstance(model.get("name"), str), f'"{at}.name" is required')
        need(isinstance(model.get("results"), list), f'"{at}.results" is required')
        for j, result in enumerate(_list(model.get("results"))):
            at = f"model-index[{i}].results[{j}]"
            result = result if isinstance(result, dict) else {}
            task, dataset = result.get("task") or {}, result.get("dataset") or {}
            need(isinstance(task.get("type"), str), f'"{at}.task.type" is required')
            need(isinstance(dataset.get("name"), str), f'"{at}.dataset.name" is required')
            need(isinstance(dataset.get("type"), str), f'"{at}.dataset.type" is required')
            need(bool(_list(result.get("metrics"))), f'"{at}.metrics" is required')
            for k, metric in enumerate(_list(result.get("metrics"))):
                metric = metric if isinstance(metric, dict) else {}
                need(isinstance(metric.get("type"), str), f'"{at}.metrics[{k}].type" is required')
                need(metric.get("value") is not None, f'"{at}.metrics[{k}].value" is required')


def _check_configs(configs: Any, need: Any) -> None:
    for i, config in enumerate(_list(configs)):
        config = config if isinstance(config, dict) else {}
        need(isinstance(config.get("config_name"), str), f'"configs[{i}].config_name" is required')
        for files in _list(config.get("data_files")):
            paths = _list(files.get("path")) if isinstance(files, dict) else [files]
            need(
                bool(paths) and all(isinstance(path, str) for path in paths),
                f'"configs[{i}].data_files" must be paths, or objects with "split" and "path"',
            )
            if isinstance(files, dict):
                need(isinstance(files.get("split"), str), f'"configs[{i}].data_files.split" is required')
