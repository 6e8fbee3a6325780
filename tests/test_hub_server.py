"""The test Hub, through the clients that will use it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
from hub_server import File, Hub, check_card, folder_oids, git_oid
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    RepoCard,
    constants,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

ALICE, BOB = "hf_alice", "hf_bob"
LARGE = random.Random(0).randbytes(11 * 2**19).hex().encode()  # 11 MiB of text: more than a commit may carry


@pytest.fixture(autouse=True)
def _users(hub: Hub):
    hub.reset()
    hub.add_user("alice", token=ALICE, organizations=["wonderland"])
    hub.add_user("alice", token="hf_alice_read", role="read")
    hub.add_user("bob", token=BOB)


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return hub.api(ALICE)


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


# Repositories and files


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_create_upload_download_delete(api: HfApi, empty_cache: Path, repo_type: str):
    url = api.create_repo("things", repo_type=repo_type, space_sdk="static" if repo_type == "space" else None)
    assert (url.repo_id, url.repo_type) == ("alice/things", repo_type)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("alice/things", repo_type=repo_type, space_sdk="static" if repo_type == "space" else None)
    assert status_of(error) == 409
    commit = api.upload_file(
        path_or_fileobj="Ünï".encode(), path_in_repo="a b/ü.txt", repo_id=url.repo_id, repo_type=repo_type
    )
    path = Path(api.hf_hub_download(url.repo_id, "a b/ü.txt", repo_type=repo_type))
    assert path.read_text(encoding="utf-8") == "Ünï"
    assert path.parent.parent.name == commit.oid
    assert api.list_repo_files(url.repo_id, repo_type=repo_type) == [".gitattributes", "a b/ü.txt"]
    api.delete_repo(url.repo_id, repo_type=repo_type)
    assert not api.repo_exists(url.repo_id, repo_type=repo_type)


def test_create_repo_again_with_exist_ok(api: HfApi):
    first = api.create_repo("wonderland/model", private=True)
    assert api.create_repo("wonderland/model", exist_ok=True) == first
    assert api.model_info("wonderland/model").private


def test_large_file_goes_through_lfs(hub: Hub, api: HfApi, empty_cache: Path):
    api.create_repo("alice/model")
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.dat", repo_id="alice/model")
    assert hub.large_files("alice/model") == {"weights.dat"}
    assert hub.files("alice/model")["weights.dat"] == LARGE
    assert Path(api.hf_hub_download("alice/model", "weights.dat")).read_bytes() == LARGE
    [info] = api.get_paths_info("alice/model", "weights.dat")
    assert isinstance(info, RepoFile)
    assert info.lfs is not None
    assert (info.size, info.lfs.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    assert len(hub.matching("PUT", "/objects/")) == 1
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="copy.dat", repo_id="alice/model")
    assert len(hub.matching("PUT", "/objects/")) == 1, "the content was there already"


def test_large_file_in_parts(hub: Hub, api: HfApi, empty_cache: Path):
    hub.part_size = 4 * 1024**2
    api.create_repo("alice/model")
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.dat", repo_id="alice/model")
    assert len(hub.matching("PUT", "/parts/")) == 3
    assert Path(api.hf_hub_download("alice/model", "weights.dat")).read_bytes() == LARGE


def test_which_files_are_large(hub: Hub, api: HfApi):
    api.create_repo("alice/model")
    contents = {"a.safetensors": b"text", "b/c.parquet": b"text", "d.txt": b"text", "e.dat": b"\0", "empty.bin": b""}
    api.create_commit("alice/model", [CommitOperationAdd(*item) for item in contents.items()], commit_message="files")
    assert hub.large_files("alice/model") == {"a.safetensors", "b/c.parquet", "e.dat"}
    files = hub.files("alice/model")
    assert {path: files[path] for path in contents} == contents


def test_commit_operations(hub: Hub, api: HfApi):
    api.create_repo("alice/model")
    add = [CommitOperationAdd(path, path.encode()) for path in ("keep", "drop", "folder/a", "folder/b")]
    first = api.create_commit("alice/model", add, commit_message="four", commit_description="files")
    change: list[Any] = [
        CommitOperationDelete("drop"),
        CommitOperationDelete("folder/"),
        CommitOperationAdd("keep", b"changed"),
    ]
    api.create_commit("alice/model", change, commit_message="fewer", parent_commit=first.oid)
    assert hub.files("alice/model").keys() == {".gitattributes", "keep"}
    assert hub.files("alice/model")["keep"] == b"changed"
    assert hub.files("alice/model", first.oid).keys() == {".gitattributes", "keep", "drop", "folder/a", "folder/b"}
    history = api.list_repo_commits("alice/model")
    assert [(c.title, c.message, c.authors) for c in history] == [
        ("fewer", "", ["alice"]),
        ("four", "files", ["alice"]),
        ("initial commit", "", ["system"]),
    ]
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(path_or_fileobj=b"late", path_in_repo="keep", repo_id="alice/model", parent_commit=first.oid)
    assert status_of(error) == 412
    with pytest.raises(EntryNotFoundError):
        api.delete_file("drop", "alice/model")


def test_unchanged_upload_makes_no_commit(api: HfApi):
    api.create_repo("alice/model")
    oids = {
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="alice/model").oid
        for path, content in [("a.txt", b"text"), ("b.bin", b"bytes"), ("a.txt", b"text"), ("b.bin", b"bytes")]
    }
    assert len(oids) == 2


def test_commit_refuses_what_the_client_would_not_send(hub: Hub, api: HfApi):
    api.create_repo("alice/model")

    def commit(key: str, **value: str) -> requests.Response:
        lines = [{"key": "header", "value": {"summary": "raw"}}, {"key": key, "value": value}]
        body = "\n".join(json.dumps(line) for line in lines)
        url = f"{hub.endpoint}/api/models/alice/model/commit/main"
        return requests.post(url, data=body, headers={"Authorization": f"Bearer {ALICE}"})

    for path in ("../up", "/root", "a/../../b", ".git/config", ""):
        assert commit("file", path=path, content="", encoding="utf-8").status_code == 400
    assert "does not exist" in commit("lfsFile", path="a.bin", algo="sha256", oid="0" * 64).json()["error"]
    bad = commit("file", path="README.md", content="---\nlicense: free\n---\n", encoding="utf-8")
    assert "Invalid metadata in README.md" in bad.json()["error"]
    assert commit("copyFile", path="a", srcPath="b").status_code == 501
    assert hub.files("alice/model").keys() == {".gitattributes"}


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
def test_ids_are_those_of_git(tmp_path: Path):
    contents = {"a": b"1", "b/c": b"2", "b/d/e": b"3", "b.txt": b"4", "b-c/x": b"5"}
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    assert folder_oids({path: File.regular(content) for path, content in contents.items()})[""] == git("write-tree")
    assert git_oid("blob", b"3") == git("hash-object", "b/d/e")


# Listings


def test_listing(hub: Hub, api: HfApi, tmp_path: Path):
    for path in ("x/1", "x/2", "x/y/3", "z"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    api.create_repo("alice/data", repo_type="dataset")
    api.upload_folder(repo_id="alice/data", folder_path=tmp_path, repo_type="dataset", commit_message="all")
    hub.page_size = 2

    def paths(path: str | None = None, recursive: bool = False) -> list[str]:
        tree = api.list_repo_tree("alice/data", path, recursive=recursive, repo_type="dataset")
        return [entry.path for entry in tree]

    assert paths() == [".gitattributes", "x", "z"]
    assert paths("x") == ["x/1", "x/2", "x/y"]
    assert paths(recursive=True) == [".gitattributes", "x", "x/1", "x/2", "x/y", "x/y/3", "z"]
    assert len(hub.matching("GET", "/tree/main$")) == 2 + 4, "pages of two entries"
    with pytest.raises(EntryNotFoundError):
        paths("missing")
    info = api.get_paths_info("alice/data", ["x/y", "z", "missing"], repo_type="dataset", expand=True)
    assert [entry.path for entry in info] == ["x/y", "z"]
    assert {entry.last_commit.title for entry in info if entry.last_commit} == {"all"}
    files = HfFileSystem(endpoint=hub.endpoint, token=ALICE, skip_instance_cache=True)
    assert files.glob("datasets/alice/data/x/*") == [f"datasets/alice/data/x/{name}" for name in ("1", "2", "y")]
    assert files.read_text("datasets/alice/data/x/y/3") == "x/y/3"
    with files.open("datasets/alice/data/x/y/3", "rb", block_size=2) as file:
        file.seek(2)
        assert file.read(2) == b"y/"


def test_list_models_and_datasets(hub: Hub, api: HfApi):
    for name in ("alice/one", "alice/two", "wonderland/three"):
        api.create_repo(name)
    api.create_repo("alice/data", repo_type="dataset", private=True)
    hub.page_size = 1
    assert [info.id for info in api.list_models(author="alice")] == ["alice/one", "alice/two"]
    assert [info.id for info in api.list_models(search="thr")] == ["wonderland/three"]
    assert [info.id for info in api.list_datasets(author="alice")] == ["alice/data"]
    assert not list(hub.api(BOB).list_datasets(author="alice")), "private"


def test_model_info_from_card_and_config(api: HfApi):
    card = "---\nlicense: mit\npipeline_tag: feature-extraction\ntags: [entity-linking]\ndatasets: [a/b]\n---\n# Hi\n"
    config = {"model_type": "bert", "architectures": ["BertModel"], "auto_map": {"AutoModel": "m.M"}}
    files = {"README.md": card, "config.json": json.dumps(config)}
    api.create_repo("alice/model")
    operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    commit = api.create_commit("alice/model", operations, commit_message="card")
    info = api.model_info("alice/model", files_metadata=True)
    assert (info.sha, info.pipeline_tag, info.library_name) == (commit.oid, "feature-extraction", "transformers")
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert {"entity-linking", "license:mit", "dataset:a/b", "custom_code"} <= set(info.tags or [])
    assert info.siblings is not None
    assert {s.rfilename: s.size for s in info.siblings}["README.md"] == len(card)
    assert api.model_info("alice/model", expand=["sha"]).siblings is None


# Branches, tags, revisions


def test_branches_tags_and_a_revision_that_moves(api: HfApi, empty_cache: Path):
    api.create_repo("alice/model")

    def put(text: str, revision: str | None = None) -> str:
        return api.upload_file(
            path_or_fileobj=text.encode(), path_in_repo="a", repo_id="alice/model", revision=revision
        ).oid

    def get(revision: str | None = None) -> str:
        return Path(api.hf_hub_download("alice/model", "a", revision=revision)).read_text()

    one = put("1")
    api.create_branch("alice/model", branch="feature/x")
    api.create_tag("alice/model", tag="v1", tag_message="first")
    two = put("2", revision="feature/x")
    three = put("3")
    assert [get(), get("feature/x"), get("v1"), get(one), get(two), get(three)] == ["3", "2", "1", "1", "2", "3"]
    put("4")
    assert [get(), get(three)] == ["4", "3"], "a branch moves, a commit does not"
    refs = api.list_repo_refs("alice/model")
    assert {b.name: b.target_commit for b in refs.branches}["feature/x"] == two
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1", one)]
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag("alice/model", tag="v1")
    assert status_of(error) == 409
    api.create_tag("alice/model", tag="v1", exist_ok=True)
    api.create_branch("alice/model", branch="feature/x", exist_ok=True)
    api.delete_branch("alice/model", branch="feature/x")
    api.delete_tag("alice/model", tag="v1")
    for gone in ("feature/x", "v1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            get(gone)
    with pytest.raises(RevisionNotFoundError):
        put("5", revision=one)


# Who may do what


def test_whoami(hub: Hub):
    about = hub.api("hf_alice_read").whoami()
    assert (about["name"], about["auth"]["accessToken"]["role"]) == ("alice", "read")
    assert [org["name"] for org in hub.api(ALICE).whoami()["orgs"]] == ["wonderland"]


def test_wrong_token(hub: Hub, api: HfApi, empty_cache: Path):
    api.create_repo("alice/model")
    api.upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id="alice/model")
    wrong = hub.api("hf_wrong")
    for call in (
        lambda: wrong.whoami(),
        lambda: wrong.create_repo("alice/other"),
        lambda: wrong.model_info("alice/model"),
        lambda: wrong.hf_hub_download("alice/model", "a"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert status_of(error) == 401
        assert not isinstance(error.value, RepositoryNotFoundError)


@pytest.mark.parametrize("token", [None, BOB, "hf_alice_read"])
def test_no_right_to_write(hub: Hub, api: HfApi, token: str | None):
    api.create_repo("alice/model")
    other = hub.api(token)
    for call in (
        lambda: other.create_repo("alice/new"),
        lambda: other.upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id="alice/model"),
        lambda: other.create_tag("alice/model", tag="v1"),
        lambda: other.delete_repo("alice/model"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert status_of(error) == (403 if token else 401)
    assert hub.files("alice/model").keys() == {".gitattributes"}


@pytest.mark.parametrize("token", [None, BOB])
def test_missing_and_private_repositories_look_the_same(hub: Hub, api: HfApi, empty_cache: Path, token: str | None):
    api.create_repo("alice/secret", private=True)
    for repo_id in ("alice/secret", "alice/missing", "missing"):
        for call in (hub.api(token).model_info, hub.api(token).list_repo_refs, hub.api(token).snapshot_download):
            with pytest.raises(RepositoryNotFoundError) as error:
                call(repo_id)
            assert status_of(error) == (404 if token else 401)
    assert api.model_info("alice/secret").id == "alice/secret"


def test_gated_repository(hub: Hub, api: HfApi, empty_cache: Path):
    hub.add_user("carol", token="hf_carol")
    api.create_repo("alice/gated")
    api.upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id="alice/gated")
    hub.gate("alice/gated", allow=["carol"])
    for token, status in ((None, 401), (BOB, 403)):
        with pytest.raises(GatedRepoError) as error:
            hub.api(token).hf_hub_download("alice/gated", "a")
        assert status_of(error) == status
        with pytest.raises(GatedRepoError):
            hub.api(token).auth_check("alice/gated")
        assert hub.api(token).model_info("alice/gated").gated == "manual"
    for token in ("hf_carol", ALICE):
        assert Path(hub.api(token).hf_hub_download("alice/gated", "a", force_download=True)).read_bytes() == b"a"


def test_settings(hub: Hub, api: HfApi):
    api.create_repo("alice/model")
    api.update_repo_settings("alice/model", gated="auto", private=True)
    info = api.model_info("alice/model")
    assert (info.gated, info.private) == ("auto", True)


def test_missing_file(hub: Hub, api: HfApi, empty_cache: Path):
    api.create_repo("alice/model")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("alice/model", "missing.txt")
    assert list(empty_cache.rglob(".no_exist/*/missing.txt")), "the client learns the commit from the answer"


# The storage


def test_storage_takes_only_signed_requests_and_the_right_content(hub: Hub, api: HfApi):
    api.create_repo("alice/model")
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="a.bin", repo_id="alice/model")
    head = requests.head(f"{hub.endpoint}/alice/model/resolve/main/a.bin")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert (head.status_code, head.headers["X-Linked-Etag"], head.headers["X-Linked-Size"]) == (302, f'"{sha256}"', "7")
    url = head.headers["Location"]
    assert not url.startswith(hub.endpoint), "another origin, so that clients drop the token"
    assert requests.get(url).content == b"weights"
    assert requests.get(url, headers={"Authorization": f"Bearer {ALICE}"}).status_code == 400
    assert requests.get(url.replace("signature=", "signature=0")).status_code == 403
    assert requests.put(url, data=b"other").status_code == 403, "signed for reading"
    batch: Any = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 5}]}
    lfs = f"{hub.endpoint}/alice/model.git/info/lfs/objects/batch"
    answer = requests.post(lfs, json=batch, headers={"Authorization": f"Bearer {ALICE}"}).json()
    assert requests.put(answer["objects"][0]["actions"]["upload"]["href"], data=b"other").status_code == 400


@pytest.mark.parametrize(
    ("wanted", "status", "content"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, b""),
        ("lines=1-2", 416, b""),
        (None, 200, b"0123456789"),
    ],
)
@pytest.mark.parametrize("path", ["a.txt", "a.bin"])
def test_ranges(hub: Hub, api: HfApi, path: str, wanted: str | None, status: int, content: bytes):
    api.create_repo("alice/model")
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo=path, repo_id="alice/model")
    headers = {"Range": wanted} if wanted else {}
    url = f"{hub.endpoint}/alice/model/resolve/main/{path}"
    answer = requests.get(url, headers=headers, allow_redirects=True)
    assert (answer.status_code, answer.content) == (status, content)
    if status == 206:
        start = 10 - len(content) if content.endswith(b"9") else 2
        assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(content) - 1}/10"


# What goes wrong


def test_upload_that_breaks_off_continues(hub: Hub, api: HfApi):
    api.create_repo("alice/model")
    hub.fail_next("PUT", "/objects/")
    with contextlib.suppress(RuntimeError):  # huggingface_hub 1 raises, and continues when called again
        api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id="alice/model")
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id="alice/model")
    assert [request.status for request in hub.matching("PUT", "/objects/")] == [None, 200]
    assert hub.files("alice/model")["weights.bin"] == LARGE


def test_interrupted_upload_is_resumed(hub: Hub, api: HfApi, tmp_path: Path):
    for name in ("a.bin", "b.bin", "c.bin"):
        (tmp_path / name).write_bytes(name.encode())
    api.create_repo("alice/model")
    hub.fail_next("PUT", "/objects/", skip=1, times=None, status=400)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(repo_id="alice/model", folder_path=tmp_path)
    assert hub.files("alice/model").keys() == {".gitattributes"}, "nothing was committed"
    done = {request.path for request in hub.matching("PUT", "/objects/") if request.status == 200}
    assert len(done) == 1
    hub.forget()
    api.upload_folder(repo_id="alice/model", folder_path=tmp_path)
    again = {request.path for request in hub.matching("PUT", "/objects/")}
    assert len(again) == 2
    assert not done & again
    assert {name: hub.files("alice/model")[name] for name in ("a.bin", "b.bin", "c.bin")} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }


def test_killed_upload_is_resumed(hub: Hub, api: HfApi):
    api.create_repo("alice/model")
    hub.delay_next("PUT", "/objects/", 60)
    upload = {"path_or_fileobj": b"w", "path_in_repo": "w.bin", "repo_id": "alice/model"}
    code = f"import huggingface_hub; huggingface_hub.upload_file(**{upload})"
    process = subprocess.Popen([sys.executable, "-c", code], env=hub.env(token=ALICE), cwd=hub.new_folder())
    hub.wait_for("PUT", "/objects/")
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert hub.files("alice/model").keys() == {".gitattributes"}
    hub.run_python(code, token=ALICE)
    assert hub.files("alice/model")["w.bin"] == b"w"


@pytest.mark.parametrize("path", ["big.txt", "big.bin"])
def test_download_that_breaks_off_continues(
    hub: Hub, api: HfApi, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, path: str
):
    content = b"0123456789abcdef" * 2**16
    api.create_repo("alice/model")
    api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="alice/model")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**10)
    hub.fail_next("GET", "/objects/|/resolve/")
    with contextlib.suppress(Exception):  # huggingface_hub 1 raises, and continues when called again
        api.hf_hub_download("alice/model", path)
    assert Path(api.hf_hub_download("alice/model", path)).read_bytes() == content
    assert [request.status for request in hub.matching("GET", "/objects/|/resolve/")] == [200, 206]
    assert hub.downloads("alice/model") == [path, path]


def test_faults_are_counted(hub: Hub):
    hub.fail_next("GET", "/whoami", status=418, skip=1, times=2)
    url, headers = f"{hub.endpoint}/api/whoami-v2", {"Authorization": f"Bearer {ALICE}"}
    assert [requests.get(url, headers=headers).status_code for _ in range(4)] == [200, 418, 418, 200]
    hub.fail_next("*", "/whoami")
    with pytest.raises(requests.ConnectionError):
        requests.get(url, headers=headers)
    hub.delay_next("GET", "/whoami", 60)
    with pytest.raises(requests.ReadTimeout):
        requests.get(url, headers=headers, timeout=0.1)
    assert [request.status for request in hub.requests] == [200, 418, 418, 200, None, None]
    with pytest.raises(TimeoutError, match="No PUT request"):
        hub.wait_for("PUT", "/whoami", timeout=0.02)


def test_what_is_not_implemented_is_said_and_kept(hub: Hub, api: HfApi):
    api.create_repo("alice/model")
    hub.forget()
    with pytest.raises(HfHubHTTPError, match="does not implement GET /api/models/alice/model/discussions"):
        list(api.get_repo_discussions("alice/model"))
    assert [request.path for request in hub.unsupported] == ["/api/models/alice/model/discussions"]
    hub.forget()


# Cards


CARD = """---
license: apache-2.0
language: [en]
pipeline_tag: feature-extraction
datasets: [alice/data]
model-index:
- name: m
  results:
  - task: {type: feature-extraction}
    dataset: {name: D, type: alice/data}
    metrics: [{type: mrr, value: 0.5}]
---
# M
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: apache-2.0", "license: free", '"license" must be one of'),
        ("language: [en]", "language: [English]", '"language" must be an ISO 639 code'),
        ("datasets: [alice/data]", "datasets: [My data]", '"datasets" must be ids'),
        ("- name: m", "- title: m", '"model-index[0].name" is required'),
        ("type: alice/data}", "id: alice/data}", '"model-index[0].results[0].dataset.type" is required'),
        ("value: 0.5", "score: 0.5", '"model-index[0].results[0].metrics[0].value" is required'),
        ("language: [en]", "language: [en", "Invalid YAML"),
    ],
)
def test_card_errors(old: str, new: str, message: str):
    errors, _ = check_card(CARD.replace(old, new), "model")
    assert len(errors) == 1
    assert message in errors[0]


def test_card_without_errors():
    assert check_card(CARD, "model") == ([], [])
    assert check_card("# No metadata", "model") == ([], ["empty or missing yaml metadata in repo card"])
    tagged = CARD.replace("pipeline_tag: feature-extraction", "pipeline_tag: entity-linking")
    errors, [warning] = check_card(tagged, "model")
    assert not errors
    assert 'The pipeline tag "entity-linking" is not in the official list' in warning
    configs = "configs:\n- config_name: c\n  data_files: [{split: train, path: c/*.parquet}]\n"
    assert check_card(f"---\n{configs}---\n", "dataset") == ([], [])
    errors, _ = check_card(f"---\n{configs.replace('split: train, ', '')}---\n", "dataset")
    assert errors == ['"configs[0].data_files.split" is required']


@pytest.mark.skipif(
    "https://huggingface.co" in inspect.getsource(RepoCard.validate), reason="this client asks huggingface.co only"
)
def test_cards_through_the_client(hub: Hub, api: HfApi, empty_cache: Path):
    api.create_repo("alice/model")
    assert hub.endpoint == constants.ENDPOINT, "ModelCard has no other way to find the Hub"
    ModelCard(CARD).push_to_hub("alice/model", token=ALICE)
    data: Any = ModelCard.load("alice/model").data
    assert data.eval_results[0].metric_value == 0.5
    bad = CARD.replace("apache-2.0", "free")
    with pytest.raises(ValueError, match="must be one of"):
        ModelCard(bad).validate()
    with pytest.raises(ValueError, match="must be one of"):
        api.upload_file(path_or_fileobj=bad.encode(), path_in_repo="README.md", repo_id="alice/model")


# Whole folders


def test_snapshot_download_takes_what_was_asked_for(hub: Hub, api: HfApi, empty_cache: Path, tmp_path: Path):
    names = ["config.json", "model.safetensors", "index/features.bin", "index/names.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    api.create_repo("alice/model")
    api.upload_folder(repo_id="alice/model", folder_path=tmp_path)
    folder = Path(api.snapshot_download("alice/model", allow_patterns="index/*"))
    assert sorted(hub.downloads("alice/model")) == names[2:]
    assert (folder / "index/features.bin").read_text() == "index/features.bin"
    hub.forget()
    api.snapshot_download("alice/model")
    assert sorted(hub.downloads("alice/model")) == [".gitattributes", *names[:2]]
    hub.forget()
    offline = api.snapshot_download("alice/model", local_files_only=True)
    assert sorted(str(p.relative_to(offline)) for p in Path(offline).rglob("*") if p.is_file()) == [
        ".gitattributes",
        *sorted(names),
    ]
    assert not hub.requests


@pytest.mark.skipif(not hasattr(HfApi, "upload_large_folder"), reason="huggingface_hub 2 has upload_folder for this")
def test_upload_large_folder(hub: Hub, api: HfApi, tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(LARGE)
    (tmp_path / "b.txt").write_text("b")
    client: Any = api
    client.upload_large_folder(repo_id="alice/data", folder_path=tmp_path, repo_type="dataset", print_report=False)
    files = hub.files("alice/data", repo_type="dataset")
    assert (files["a.bin"], files["b.txt"]) == (LARGE, b"b")


# Processes of their own


def test_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HF_HUB_CACHE", "/home/me")
    env = hub.env()
    assert "HF_TOKEN" not in env
    assert "HF_HUB_CACHE" not in env
    assert env["PATH"] == os.environ["PATH"]
    assert not list(Path(env["HF_HOME"]).iterdir())
    assert hub.env(token=BOB, home=tmp_path)["HF_TOKEN"] == BOB
    assert hub.env(home=tmp_path)["HF_HOME"] == str(tmp_path)


def test_run_python(hub: Hub):
    done = hub.run_python(
        """
        import os, huggingface_hub
        print(huggingface_hub.whoami()["name"], os.listdir(), os.environ["EXTRA"])
        """,
        token=BOB,
        env={"EXTRA": "1"},
    )
    assert done.stdout == "bob ['script.py'] 1\n"
    with pytest.raises(AssertionError, match=r"(?s)Exit code 3.*out.*err"):
        hub.run_python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert hub.run_python("raise SystemExit(3)", check=False).returncode == 3


def test_a_hub_of_its_own_needs_no_fixture():
    with Hub() as other:
        other.add_user("dora", token="hf_dora")
        assert other.api("hf_dora").whoami()["name"] == "dora"
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{other.endpoint}/api/whoami-v2")


# transformers and datasets


def tiny_bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    return BertModel(config)


CUSTOM_CODE = """
from transformers import BertConfig, BertModel


class OddConfig(BertConfig):
    model_type = "odd-bert"


class OddModel(BertModel):
    config_class = OddConfig

    def odd(self):
        return "odd"
"""

LOAD_ALL = """
import json

import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModel

torch.set_num_threads(1)
config = AutoConfig.from_pretrained("alice/bert")
model = AutoModel.from_pretrained("alice/bert", revision="v1")
odd = AutoModel.from_pretrained("alice/odd", trust_remote_code=True)
pushed = load_dataset("alice/pushed", split="train")
mentions = load_dataset("alice/folder", "mentions")
entities = load_dataset("alice/folder", "entities", split="kb", streaming=True)
print(json.dumps({
    "hidden": config.hidden_size,
    "sum": model.embeddings.word_embeddings.weight.double().sum().item(),
    "odd": [odd.odd(), type(odd).__module__.split(".")[0]],
    "pushed": pushed.to_dict(),
    "mentions": {split: rows.to_dict() for split, rows in mentions.items()},
    "entities": list(entities),
}))
"""


def test_a_new_process_loads_models_and_data_sets(hub: Hub, api: HfApi, tmp_path: Path):
    import torch
    from datasets import Dataset

    model = tiny_bert()
    model.push_to_hub("alice/bert", token=ALICE)
    api.create_tag("alice/bert", tag="v1")
    expected = model.embeddings.word_embeddings.weight.double().sum().item()
    torch.nn.init.zeros_(model.embeddings.word_embeddings.weight)
    model.push_to_hub("alice/bert", token=ALICE, commit_message="Zero")
    assert [commit.title for commit in api.list_repo_commits("alice/bert")][:2] == ["Zero", "Upload model"]

    model.save_pretrained(tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    config |= {"model_type": "odd-bert", "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"}}
    (tmp_path / "odd/config.json").write_text(json.dumps(config))
    (tmp_path / "odd/odd.py").write_text(CUSTOM_CODE)
    api.create_repo("alice/odd", private=True)
    api.upload_folder(repo_id="alice/odd", folder_path=tmp_path / "odd")

    rows = {"id": ["1", "2"], "text": ["one", "two"]}
    Dataset.from_dict(rows).push_to_hub("alice/pushed", token=ALICE)
    Dataset.from_dict(rows).push_to_hub("alice/pushed", token=ALICE, split="test")

    folder = tmp_path / "folder"
    for name in ("mentions/train", "mentions/test", "entities/kb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"id": [name]}).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        """---
configs:
- config_name: mentions
  data_files:
  - {split: train, path: mentions/train-*.parquet}
  - {split: test, path: mentions/test-*.parquet}
- config_name: entities
  data_files:
  - {split: kb, path: entities/kb-*.parquet}
---
"""
    )
    api.create_repo("alice/folder", repo_type="dataset")
    api.upload_folder(repo_id="alice/folder", folder_path=folder, repo_type="dataset")
    assert not hub.unsupported

    hub.forget()
    loaded = json.loads(hub.run_python(LOAD_ALL, token=ALICE).stdout.splitlines()[-1])
    assert loaded == {
        "hidden": 8,
        "sum": pytest.approx(expected, abs=1e-9),
        "odd": ["odd", "transformers_modules"],
        "pushed": rows,
        "mentions": {"train": {"id": ["mentions/train"]}, "test": {"id": ["mentions/test"]}},
        "entities": [{"id": "entities/kb"}],
    }
    assert expected != 0
    assert not hub.unsupported
    assert set(hub.downloads("alice/bert")) == {"config.json", "model.safetensors"}
    assert set(hub.downloads("alice/folder", repo_type="dataset")) == {
        "README.md",
        "mentions/train-00000-of-00001.parquet",
        "mentions/test-00000-of-00001.parquet",
        "entities/kb-00000-of-00001.parquet",
    }


def test_transformers_and_datasets_in_this_process(hub: Hub, api: HfApi, empty_cache: Path, tmp_path: Path):
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from transformers import BertModel, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        push_to_hub=True,
        hub_model_id="alice/trained",
        hub_token=ALICE,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(tiny_bert(), arguments)
    trainer.push_to_hub(commit_message="End of training")
    assert {"model.safetensors", "config.json", "README.md", "training_args.bin"} <= hub.files("alice/trained").keys()
    assert BertModel.from_pretrained("alice/trained").config.hidden_size == 8

    Dataset.from_dict({"id": ["1"]}).push_to_hub("alice/data", "mentions", private=True, token=ALICE)
    cache = str(tmp_path / "datasets")
    with pytest.raises(DatasetNotFoundError, match="doesn't exist on the Hub or cannot be accessed"):
        load_dataset("alice/data", "mentions", cache_dir=cache)
    hub.gate("alice/data", repo_type="dataset")
    api.update_repo_settings("alice/data", private=False, repo_type="dataset")
    with pytest.raises(DatasetNotFoundError, match="is a gated dataset"):
        load_dataset("alice/data", "mentions", cache_dir=cache)
    mine = load_dataset("alice/data", "mentions", token=ALICE, cache_dir=cache)
    assert mine["train"].to_dict() == {"id": ["1"]}
    with pytest.raises(OSError, match="is not a local folder and is not a valid model identifier"):
        BertModel.from_pretrained("alice/missing")
    with pytest.raises(OSError, match="v9 is not a valid git identifier"):
        BertModel.from_pretrained("alice/trained", revision="v9")
    assert not hub.unsupported
