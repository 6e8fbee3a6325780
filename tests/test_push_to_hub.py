"""`mimic-el push`, against a Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hub_server import Hub
from huggingface_hub import RepoCard
from published import CODE_FILES, TASK, entities_and_mentions, same_links, save_linker
from toy_data import write_dataset
from transformers import pipeline

from mimic_el import EntityIndex, MimicModel, MimicProcessor
from mimic_el.scripts.push_to_hub import main

ALICE, BOB = "hf_alice", "hf_bob"
CARD = """---
library_name: transformers
license: mit
tags:
- mimic
---

# linker

```python
entities = load_dataset("toys", "entities", split="kb")
linker = pipeline("multimodal-entity-linking", model="linker", trust_remote_code=True)
```
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with what training leaves beside it, its index, and a data set."""
    root = tmp_path_factory.mktemp("made")
    directory = save_linker(root / "linker", default_index="index")
    (directory / "README.md").write_text(CARD)
    (directory / "test_results.json").write_text("{}")
    (directory / "training_args.bin").write_bytes(b"a pickle")
    (directory / "checkpoint-10").mkdir()
    (directory / "checkpoint-10" / "optimizer.pt").write_bytes(b"much")
    entities, _ = entities_and_mentions(root / "images")
    model, processor = MimicModel.from_pretrained(directory), MimicProcessor.from_pretrained(directory)
    EntityIndex.build(model, processor, entities, directory / "index", show_progress=False)
    toys = write_dataset(root / "toys")
    card = RepoCard.load(toys / "README.md", ignore_metadata_errors=True)
    card.data.license = "cc0-1.0"
    card.save(toys / "README.md")
    (toys / ".cache").mkdir()
    (toys / ".cache" / "state").write_text("ours")
    return root


@pytest.fixture
def directories(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture(autouse=True)
def _users(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.reset()
    hub.add_user("alice", token=ALICE)
    hub.add_user("bob", token=BOB)
    monkeypatch.setenv("HF_TOKEN", ALICE)


@pytest.fixture
def publish(directories: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command with all three, and gives its status, output and errors."""

    def run(*options: str) -> tuple[int, str, str]:
        status = main(arguments(directories, *options))
        return status, *capsys.readouterr()

    return run


def arguments(root: Path, *options: str) -> list[str]:
    places = ["--model_dir", f"{root}/linker", "--index_dir", f"{root}/linker/index", "--dataset_dir", f"{root}/toys"]
    return ["--namespace", "alice", *places, *options]


def listed(output: str) -> dict[tuple[str, str], str]:
    """What a listing says of each file: (repository, path) -> state."""
    found, repository = {}, ""
    for line in output.splitlines():
        if match := re.match(r"  (new|changed|same|unknown|delete) +(\S+)", line):
            found[repository, match[2]] = match[1]
        elif line and not line.startswith(" "):
            repository = line.split()[0]
    return found


def stored(hub: Hub) -> dict[tuple[str, str], bytes]:
    repositories = {"alice/linker": "model", "datasets/alice/linker-index": "dataset", "datasets/alice/toys": "dataset"}
    return {
        (address, path): content
        for address, repo_type in repositories.items()
        for path, content in hub.files(address.removeprefix("datasets/"), repo_type=repo_type).items()
        if path != ".gitattributes"
    }


def test_all_in_one_go(
    hub: Hub, publish: Callable[..., Any], directories: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
):
    status, output, errors = publish("--dry_run")
    assert (status, errors) == (0, "")
    assert "Nothing was sent" in output
    assert not hub.matching("POST", "/(commit|create|preupload)")
    promised = listed(output)
    assert set(promised.values()) == {"new"}

    status, output, _ = publish()
    assert status == 0
    assert listed(output) == promised
    assert set(stored(hub)) == set(promised), "a dry run lists exactly what is uploaded"
    files = {path: content for (address, path), content in stored(hub).items() if address == "alice/linker"}
    assert set(files) > CODE_FILES | {"config.json", "model.safetensors", "README.md", "test_results.json"}
    assert not {"training_args.bin", "checkpoint-10/optimizer.pt"} & set(files)
    assert "left out: checkpoint-10/, index/, training_args.bin" in output
    assert "left out: .cache" in output

    sizes = {match[1]: match[2] for match in re.finditer(r"  new +(\S+) +(\d+ B)$", output, re.MULTILINE)}
    assert sizes["test_results.json"] == "2 B"
    assert json.loads(files["config.json"])["default_index"] == "alice/linker-index"
    assert json.loads((directories / "linker" / "config.json").read_text())["default_index"] == "index"

    # The snippet at the end is what a user needs.
    code = output[output.index("from transformers import") :].rpartition("\n" + "linker(")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    entities, mentions = entities_and_mentions(directories / "images")
    model = MimicModel.from_pretrained(directories / "linker")
    processor = MimicProcessor.from_pretrained(directories / "linker")
    local = pipeline(TASK, model=model, processor=processor, entities=entities)
    assert same_links(names["linker"](mentions), local(mentions))


def test_cards_speak_of_what_was_published(hub: Hub, publish: Callable[..., Any]):
    assert publish()[0] == 0
    model_card = hub.files("alice/linker")["README.md"].decode()
    assert 'model="alice/linker"' in model_card
    assert 'load_dataset("alice/toys"' in model_card
    assert RepoCard(model_card).data.to_dict()["datasets"] == ["alice/toys"]
    index_card = RepoCard(hub.files("alice/linker-index", repo_type="dataset")["README.md"].decode())
    metadata = index_card.data.to_dict()
    assert metadata["base_model"] == "alice/linker"
    assert metadata["source_datasets"] == ["alice/toys"]
    assert metadata["license"] == "cc0-1.0"


def test_repeating_sends_only_what_is_new(hub: Hub, publish: Callable[..., Any], directories: Path):
    assert publish()[0] == 0
    hub.forget()
    status, output, _ = publish()
    assert status == 0
    assert set(listed(output).values()) == {"same"}
    assert not hub.matching("POST", "/commit/")
    assert "0 files to upload, 0 B" in output

    (directories / "linker" / "README.md").write_text(CARD + "More.\n")
    (directories / "linker" / "eval_results.json").write_text("{}")
    old, new = (f"mentions/test-00000-of-0000{count}.parquet" for count in (1, 2))
    (directories / "toys" / old).rename(directories / "toys" / new)
    states = listed(publish("--dry_run")[1])
    assert {key: state for key, state in states.items() if state != "same"} == {
        ("alice/linker", "README.md"): "changed",
        ("alice/linker", "eval_results.json"): "new",
        ("datasets/alice/toys", new): "new",
        ("datasets/alice/toys", old): "delete",
    }
    assert publish()[0] == 0
    assert ("datasets/alice/toys", old) not in stored(hub)
    assert set(listed(publish()[1]).values()) == {"same"}


def test_interruption_is_gone_on_from(hub: Hub, publish: Callable[..., Any]):
    hub.fail_next("PUT", "/objects/", status=403, skip=5, times=None)
    status, _, errors = publish()
    assert status == 1
    assert "Error while uploading" in errors
    assert "Run the same command again" in errors
    sent = {request.path for request in hub.matching("PUT", "/objects/") if request.status == 200}
    hub.forget()
    assert publish()[0] == 0
    assert len(sent) == 5
    assert not sent & {request.path for request in hub.matching("PUT", "/objects/")}


def test_private(hub: Hub, publish: Callable[..., Any]):
    assert publish("--private")[0] == 0
    api = hub.api(ALICE)
    assert api.model_info("alice/linker").private
    assert api.dataset_info("alice/toys").private
    assert api.dataset_info("alice/linker-index").private
    assert publish("--private")[0] == 0

    api.update_repo_settings("alice/toys", repo_type="dataset", private=False)
    status, _, errors = publish("--private")
    assert status == 1
    assert "datasets/alice/toys is there already, and public" in errors


def test_names_and_default_index(hub: Hub, publish: Callable[..., Any]):
    names = ["--model_name", "mimic", "--index_name", "kb", "--dataset_names", "data"]
    status, output, _ = publish(*names, "--no-set_default_index")
    assert status == 0
    assert 'model="alice/mimic"' in output
    assert 'index="alice/kb"' in output
    # A folder of this machine is not named either.
    assert json.loads(hub.files("alice/mimic")["config.json"])["default_index"] is None
    assert "the folder 'index' here, which is not published" in output
    assert hub.files("alice/kb", repo_type="dataset")
    assert hub.files("alice/data", repo_type="dataset")


def test_one_alone(hub: Hub, directories: Path, capsys: pytest.CaptureFixture[str], empty_cache: Path):
    assert main(["--namespace", "alice", "--index_dir", str(directories / "linker" / "index")]) == 0
    assert 'EntityIndex.from_pretrained("alice/index")' in capsys.readouterr().out
    assert len(EntityIndex.from_pretrained("alice/index")) == 12
    assert main(["--namespace", "alice", "--dataset_dir", str(directories / "toys")]) == 0
    assert 'load_dataset("alice/toys", "mentions")' in capsys.readouterr().out
    assert main(["--namespace", "alice", "--model_dir", str(directories / "linker")]) == 0
    assert 'model="alice/linker"' in capsys.readouterr().out


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda root: shutil.rmtree(root / "toys"), "There is no directory"),
    "no checkpoint": (lambda root: (root / "linker" / "config.json").unlink(), "is not a checkpoint"),
    "no weights": (lambda root: (root / "linker" / "model.safetensors").unlink(), "has no weights"),
    "no processor": (lambda root: (root / "linker" / "processor_config.json").unlink(), "has no processor"),
    "no code": (lambda root: (root / "linker" / "store_mimic.py").unlink(), "lacks code"),
    "index of another model": (
        lambda root: save_linker(root / "linker", seed=1),
        "This index was made by the model",
    ),
    "no index": (lambda root: (root / "linker" / "index" / "index_config.json").unlink(), "There is no entity index"),
    "no card of the data": (lambda root: (root / "toys" / "README.md").unlink(), "is not a data set"),
    "no configurations": (
        lambda root: (root / "toys" / "README.md").write_text("---\nlicense: mit\n---\n"),
        "no configuration 'entities' and 'mentions'",
    ),
    "no data": (lambda root: shutil.rmtree(root / "toys" / "mentions"), "there is no such file"),
    "card that the Hub refuses": (
        lambda root: (root / "linker" / "README.md").write_text(CARD.replace("mit", "my-own")),
        "is not valid",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_nothing_is_sent_if_something_is_wrong(hub: Hub, publish: Callable[..., Any], directories: Path, name: str):
    spoil, message = BROKEN[name]
    spoil(directories)
    status, _, errors = publish()
    assert status == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert not hub.matching("POST", "/(commit|create|preupload)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_names", "a", "b"], "There are 1 data sets, but 2 --dataset_names"),
        (["--dataset_names", "linker-index"], "names of their own"),
        (["--model_name", "no spaces"], "no spaces"),
    ],
)
def test_names_that_will_not_do(hub: Hub, publish: Callable[..., Any], options: list[str], message: str):
    status, _, errors = publish(*options)
    assert status == 1
    assert message in errors


@pytest.mark.parametrize("token", [BOB, "hf_wrong", ""])
def test_who_may_not(hub: Hub, publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, token: str):
    monkeypatch.setenv("HF_TOKEN", token)
    status, _, errors = publish()
    assert status == 1
    assert "hf auth login" in errors
    assert not hub.matching("POST", "/commit/")


def test_unreachable_hub(publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, _, errors = publish()
    assert status == 1
    assert "http://127.0.0.1:9 refuses, or cannot be reached" in errors


def test_dry_run_without_network(hub: Hub, publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    promised = listed(publish("--dry_run")[1])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, output, errors = publish("--dry_run")
    assert (status, errors) == (0, "")
    assert listed(output) == dict.fromkeys(promised, "unknown")
    assert "up already is not known" in output
    assert "Nothing was sent" in output


LINKS: dict[str, Callable[[Path, Path], Path]] = {
    "file of a model": lambda root, secret: root / "linker" / "notes_results.json",
    "file of an index": lambda root, secret: next((root / "linker" / "index").glob("shard-*.jsonl")),
    "file of a data set": lambda root, secret: root / "toys" / "mentions" / "extra.parquet",
    "folder of a data set": lambda root, secret: root / "toys" / "more",
}


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_the_folder_are_refused(
    hub: Hub, publish: Callable[..., Any], directories: Path, tmp_path: Path, name: str
):
    place = LINKS[name](directories, tmp_path)
    target = tmp_path / "private"
    if name == "file of an index":
        place.rename(target)  # an index that is whole, but in part elsewhere
    elif name.startswith("folder"):
        target.mkdir()
        (target / "key").write_text("private")
    else:
        target.write_text("private")
    place.symlink_to(target)
    status, _, errors = publish()
    assert status == 1
    assert f"error: {place} is a symbolic link to" in errors
    assert not hub.matching("POST", "/(commit|create|preupload)")


@pytest.mark.parametrize("directory", ["linker", "toys"])
@pytest.mark.parametrize("metadata", ["a: [1\n", "- a list\n", "a: b: c\n"])
def test_cards_that_are_not_valid_are_named(publish: Callable[..., Any], directories: Path, directory: str, metadata):
    (directories / directory / "README.md").write_text(f"---\n{metadata}---\n# Title\n")
    status, _, errors = publish("--dry_run")
    assert status == 1
    assert errors.startswith(f"error: {directories / directory / 'README.md'} cannot be read")


@pytest.mark.skipif(not hasattr(huggingface_hub, "EvalResultEntry"), reason="huggingface_hub is too old for it")
def test_figures_go_to_the_leaderboard_of_a_data_set_that_is_published_too(directories: Path, hub: Hub) -> None:
    linker, toys = directories / "linker", directories / "toys"
    (linker / "test_results.json").write_text('{"test_hits@1": 0.5, "test_mrr": 0.625, "test_mentions": 9}')
    (linker / "README.md").write_text(f'{CARD}\n```python\nload_dataset("toys", "mentions")\n```\n')
    arguments = ["--namespace", "alice", "--model_dir", str(linker), "--dataset_dir", str(toys)]
    assert main(arguments) == 0
    text = hub.files("alice/linker")[".eval_results/toys.yaml"].decode()
    entries = huggingface_hub.parse_eval_result_entries(yaml.safe_load(text))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("alice/toys", "hits_at_1", 50.0),
        ("alice/toys", "mrr", 62.5),
    ]


@pytest.mark.parametrize(
    "metadata",
    ["a: [", "a: b: c", "- a\n- b", "license: {", "\t- x", "!!python/object:os.system {}", "&a [*a, *a]", "configs: 5",
     "configs: [5]", "datasets: {a: 1}", "model-index: 5", "\x00"],
)  # fmt: skip
@pytest.mark.parametrize("what", ["linker", "toys"])
def test_a_card_whose_metadata_is_damaged_is_one_line(
    directories: Path, capsys: pytest.CaptureFixture[str], metadata: str, what: str
) -> None:
    (directories / what / "README.md").write_text(f"---\n{metadata}\n---\n# Hi\n")
    option = "--model_dir" if what == "linker" else "--dataset_dir"
    status = main(["--namespace", "alice", option, str(directories / what), "--dry_run"])
    printed = capsys.readouterr().err
    assert status in (0, 1)
    assert "Traceback" not in printed
    if status:
        assert printed.startswith("error: ")
        assert len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "card",
    ["---\ntags:\n" + "- abc\n" * 30_000 + "---\n# linker\n", "---\nlicense: mit\n---\n" + "# linker\n" * 500_000],
    ids=["metadata", "text"],
)
def test_a_card_that_would_be_read_for_minutes_is_refused(
    card: str, directories: Path, publish: Callable[..., tuple[int, str, str]]
) -> None:
    for name in ("linker", "toys"):
        path = directories / name / "README.md"
        before = path.read_text()
        path.write_text(card)
        status, output, errors = publish("--dry_run")
        assert (status, output) == (1, "")
        assert f"{path} is too large: a card may have 4,194,304 bytes" in errors
        path.write_text(before)
