"""Model, index and data set, pushed to a Hub and used from there with nothing in the cache; and what can go wrong."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, check_card
from huggingface_hub import CommitOperationAdd, HfApi, RepoCard
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError
from published import CODE_FILES, TASK, entities_and_mentions, same_links, save_linker
from python_processes import ForkingPython, clean_python, own_python
from toy_data import write_dataset
from transformers import pipeline

from mimic_el import EntityIndex, EntityIndexError, MimicModel, MimicProcessor, index_hub_mimic
from mimic_el.pipeline_mimic import MultimodalEntityLinkingPipeline

ALICE, BOB = "hf_alice", "hf_bob"
INDEX = "alice/kb-index"
Linker = tuple[MimicModel, MimicProcessor]


@pytest.fixture(scope="module")
def linker(tmp_path_factory: pytest.TempPathFactory) -> Linker:
    directory = save_linker(tmp_path_factory.mktemp("checkpoints") / "linker")
    return MimicModel.from_pretrained(directory), MimicProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    entities, mentions = entities_and_mentions(tmp_path_factory.mktemp("images"))
    return {"entities": entities, "mentions": mentions}


@pytest.fixture(scope="module")
def index(linker: Linker, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> EntityIndex:
    """In a directory, in three parts, of which only some entities have a `qid`."""
    directory = tmp_path_factory.mktemp("indexes") / "kb"
    return EntityIndex.build(*linker, data["entities"], directory, shard_entities=5, show_progress=False)


@pytest.fixture(scope="module")
def links(linker: Linker, index: EntityIndex, data: dict[str, Any]) -> list[list[dict[str, Any]]]:
    model, processor = linker
    return pipeline(TASK, model=model, processor=processor, index=index)(data["mentions"], top_k=3)


@pytest.fixture(scope="module")
def api(hub: Hub, linker: Linker, index: EntityIndex, tmp_path_factory: pytest.TempPathFactory) -> HfApi:
    """Alice's, who has published a model, its index and a data set."""
    hub.add_user("alice", token=ALICE)
    hub.add_user("bob", token=BOB)
    model, processor = linker
    model.push_to_hub("alice/linker", token=ALICE)  # type: ignore[arg-type]
    processor.push_to_hub("alice/linker", token=ALICE)
    index.push_to_hub(INDEX, token=ALICE, model_id="alice/linker", license="cc-by-sa-4.0", source="alice/toys")
    api = hub.api(ALICE)
    api.create_repo("alice/toys", repo_type="dataset")
    toys = write_dataset(tmp_path_factory.mktemp("datasets") / "toys")
    api.upload_folder(repo_id="alice/toys", repo_type="dataset", folder_path=toys)
    return api


@pytest.fixture
def clean(hub: Hub) -> ForkingPython:
    return clean_python(hub)


# Round trips


@pytest.mark.parametrize("part", [0, 1], ids=["model", "processor"])
def test_saving_and_uploading_in_one_call(part: int, linker: Linker, api: HfApi, hub: Hub, tmp_path: Path):
    """By the directory's name, where no other is given."""
    what: Any = linker[part]
    what.save_pretrained(tmp_path / f"saved-{part}", push_to_hub=True, token=ALICE)
    what.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id=f"alice/given-{part}", token=ALICE)
    for place, repository in ((f"saved-{part}", f"alice/saved-{part}"), ("other", f"alice/given-{part}")):
        saved = {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()}
        uploaded = hub.files(repository)
        assert set(saved) == set(uploaded) - {"README.md", ".gitattributes"}
        type(what).from_pretrained(repository, token=ALICE)


BY_ID = """
    from transformers import pipeline

    result = pipeline(model="alice/linker", trust_remote_code=True, **options)(mentions, top_k=3)
"""


def test_only_what_is_needed_is_downloaded(
    hub: Hub, api: HfApi, clean: ForkingPython, index: EntityIndex, data: dict, links: list
):
    found = clean.run(BY_ID, options={"index": INDEX}, mentions=data["mentions"])
    assert same_links(found, links)
    needed = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    model_files = hub.downloads("alice/linker")
    assert set(model_files) == needed | CODE_FILES
    index_files = hub.downloads(INDEX, repo_type="dataset")
    parts = {
        name for name in hub.files(INDEX, repo_type="dataset") if name.startswith(("shard-", "matcher-", "names-"))
    }
    assert set(index_files) == {"index_config.json"} | parts
    assert len(parts) == 2 * 3 + 2
    for files in (model_files, index_files):
        assert len(files) == len(set(files)), "nothing is downloaded twice"
    hub.forget()
    assert same_links(clean.run(BY_ID, options={"index": INDEX}, mentions=data["mentions"], keep_cache=True), links)
    assert hub.downloads("alice/linker") + hub.downloads(INDEX, repo_type="dataset") == []


def test_default_index(
    hub: Hub, api: HfApi, clean: ForkingPython, linker: Linker, index: EntityIndex, data: dict, links: list
):
    """What the configuration names, at the revision that it names, if the user names nothing."""
    index.push_to_hub("alice/moving", token=ALICE)
    commit = api.repo_info("alice/moving", repo_type="dataset").sha
    EntityIndex.build(*linker, data["entities"][:2], show_progress=False).push_to_hub("alice/moving", token=ALICE)
    api.create_repo("alice/named")
    files = hub.files("alice/linker")
    api.create_commit(
        "alice/named", [CommitOperationAdd(name, files[name]) for name in files], commit_message="The same model"
    )

    def found(options: dict[str, Any], **settings: Any) -> list[list[dict[str, Any]]]:
        config = json.dumps({**json.loads(files["config.json"]), **settings}).encode()
        api.upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id="alice/named")
        return clean.run(BY_ID.replace("alice/linker", "alice/named"), options=options, mentions=data["mentions"])

    assert same_links(found({}, default_index="alice/moving", default_index_revision=commit), links)
    assert {len(answer) for answer in found({}, default_index="alice/moving")} == {2}
    # What the user names comes first.
    options = {"entities": data["entities"][:1]}
    assert {len(answer) for answer in found(options, default_index="alice/moving")} == {1}


@pytest.mark.parametrize("name", ["alice/gone", "gone"])
def test_default_index_that_is_not_there(api: HfApi, linker: Linker, empty_cache: Path, name: str):
    """The name of a folder stands for one in the model's repository."""
    model, processor = MimicModel.from_pretrained("alice/linker"), linker[1]
    model.config.default_index = name
    with pytest.raises(EntityIndexError) as error:
        pipeline(TASK, model=model, processor=processor)
    assert f"names {name!r} as its default index" in str(error.value)
    assert "`index=` or `entities=`" in str(error.value)
    assert ("alice/linker" in str(error.value).partition("The checkpoint")[0]) == (name == "gone")


def test_all_three_in_a_fresh_process(hub: Hub, api: HfApi, data: dict[str, Any], links: list):
    """With `datasets`, which the data set needs; the index's entities are one too."""
    code = """
        from datasets import load_dataset
        from transformers import pipeline

        mentions_of_toys = load_dataset("alice/toys", "mentions", split="test")
        entities = load_dataset("alice/toys", "entities", split="kb")
        linker = pipeline(model="alice/linker", trust_remote_code=True, entities=entities)
        [of_toys] = linker(mentions_of_toys.select([0]), top_k=len(entities))
        linker = pipeline(model="alice/linker", trust_remote_code=True, index=index)
        result = {
            "toys": sorted(link["entity_id"] for link in of_toys),
            "answers": list(mentions_of_toys["answer"]),
            "entities": list(entities["id"]),
            "table": load_dataset(index, "entities", split="kb").to_list(),
            "links": linker(mentions, top_k=3),
        }
    """
    found = own_python(hub).run(code, index=INDEX, mentions=data["mentions"])
    assert found["toys"] == sorted(found["entities"])
    assert set(found["answers"]) <= set(found["entities"])
    assert found["table"] == [{name: entity[name] for name in TABLE} for entity in data["entities"]]
    assert same_links(found["links"], links)


TABLE = ("id", "name", "description", "qid")


# The index's page


def test_index_card_is_valid_and_says_what_is_there(hub: Hub, api: HfApi, index: EntityIndex, data: dict[str, Any]):
    text = hub.files(INDEX, repo_type="dataset")["README.md"].decode()
    assert check_card(text, "dataset") == ([], [])
    metadata = RepoCard(text).data.to_dict()
    assert metadata["license"] == "cc-by-sa-4.0"
    assert metadata["base_model"] == "alice/linker"
    assert metadata["source_datasets"] == ["alice/toys"]
    assert metadata["size_categories"] == ["n<1K"]
    described = [entity["description"] for entity in data["entities"] if entity["description"]]
    mean = sum(map(len, described)) / len(described)
    for fact in (
        f'index="{INDEX}"',
        'model="alice/linker"',
        f'load_dataset("{INDEX}"',
        "| Entities | 12 |",
        f"| With a description | {len(described)} ({len(described) / 12:.0%}), of {mean:.0f} characters on average |",
        "| Fields | id, name, description, qid |",
        "float16",
        "| e0 | Orange 0 |",
        "cut at 40 tokens",
    ):
        assert fact in text


def test_index_card_tells_no_path_of_this_machine(hub: Hub, api: HfApi, index: EntityIndex):
    index.push_to_hub("alice/anonymous", token=ALICE)
    files = hub.files("alice/anonymous", repo_type="dataset")
    assert index.directory is not None
    for name in ("README.md", "index_config.json"):
        assert str(index.directory.parents[1]) not in files[name].decode()
    text = files["README.md"].decode()
    assert "base_model" not in text
    assert "license" in text.lower()
    assert "license:" not in text
    assert '"THE-MODEL"' in text


def test_hostile_texts_do_no_harm_in_a_card(hub: Hub, api: HfApi, linker: Linker):
    entities = [
        {
            "id": "a|b",
            "name": "<script>alert(1)</script>\n# Heading",
            "description": "[x](http://x) " * 50,
            "`|<b>: {": "more",
        }
    ]
    index = EntityIndex.build(*linker, entities, show_progress=False)
    index.push_to_hub("alice/hostile", token=ALICE)
    text = hub.files("alice/hostile", repo_type="dataset")["README.md"].decode()
    assert check_card(text, "dataset") == ([], [])
    [row] = [line for line in text.splitlines() if line.startswith("| a")]
    assert row.count(" | ") == 2
    assert "<script" not in text
    assert "\n# Heading" not in text
    assert "](http://x)" not in text
    assert len(row) < 300
    assert "| Fields | id, name, description, \\`\\|&lt;b\\>: \\{ |" in text


@pytest.mark.parametrize("facts", [None, {}, [], {"described": 1, "characters": 1, "fields": {"id": "<b>"}}])
def test_card_of_an_index_that_tells_nothing_of_its_tables(hub: Hub, api: HfApi, index: EntityIndex, facts: Any):
    """An older one, or one that somebody changed."""
    assert index.directory is not None
    copy = index.directory.parent / "copy"
    shutil.copytree(index.directory, copy, dirs_exist_ok=True)
    manifest = json.loads((copy / "index_config.json").read_text())
    for entry in manifest["shards"]:
        entry["facts"] = facts
    del manifest["digest"]
    (copy / "index_config.json").write_text(json.dumps(manifest))
    EntityIndex.from_pretrained(copy).push_to_hub("alice/copy", token=ALICE)
    index.push_to_hub("alice/copied", token=ALICE)
    cards = [hub.files(f"alice/{name}", repo_type="dataset")["README.md"] for name in ("copy", "copied")]
    assert facts_of(cards[0]) == facts_of(cards[1])
    assert len(facts_of(cards[0])) == 3 + len(TABLE)


def facts_of(card: bytes) -> list[str]:
    return [
        line for line in card.decode().splitlines() if line.startswith(("| With", "| Fields", "| Size", "  - name"))
    ]


# Changing what is there


def test_pushing_again_replaces_the_index(hub: Hub, api: HfApi, linker: Linker, data: dict[str, Any], tmp_path: Path):
    index = EntityIndex.build(*linker, data["entities"], tmp_path / "kb", show_progress=False)
    index.push_to_hub("alice/changing", token=ALICE)
    before = set(hub.files("alice/changing", repo_type="dataset"))
    index.remove(["e3"])
    index.add(*linker, [{"id": "new", "name": "New", "description": "", "images": None}], show_progress=False)
    index.push_to_hub("alice/changing", token=ALICE)
    after = set(hub.files("alice/changing", repo_type="dataset"))
    assert {name for name in before & after if name.startswith("shard-")} == set()
    again = EntityIndex.from_pretrained("alice/changing", cache_dir=tmp_path / "cache")
    assert list(again) == list(index)
    again.verify()
    with pytest.raises(EntityIndexError, match="must not be changed"):
        again.remove(["new"])
    commits = len(api.list_repo_commits("alice/changing", repo_type="dataset"))
    again.push_to_hub("alice/changing", token=ALICE)
    assert len(api.list_repo_commits("alice/changing", repo_type="dataset")) == commits, "nothing had changed"


def test_interrupted_upload_goes_on(hub: Hub, api: HfApi, index: EntityIndex, empty_cache: Path):
    api.create_repo("alice/slow", repo_type="dataset")
    hub.fail_next("PUT", "/objects/", status=403, skip=3, times=None)
    # Files are sent by several threads: which of them is refused first is not determined.
    with pytest.raises(RuntimeError, match=r"Error while uploading '(shard|names|matcher|removed)-"):
        index.push_to_hub("alice/slow", token=ALICE)
    assert set(hub.files("alice/slow", repo_type="dataset")) == {".gitattributes"}, "a half index must not be seen"
    with pytest.raises(EntityIndexError, match="not an entity index"):
        EntityIndex.from_pretrained("alice/slow")
    sent = {request.path for request in hub.matching("PUT", "/objects/") if request.status == 200}
    hub.forget()
    index.push_to_hub("alice/slow", token=ALICE)
    assert sent
    assert not sent & {request.path for request in hub.matching("PUT", "/objects/")}, "what is up is not sent again"
    EntityIndex.from_pretrained("alice/slow").verify()


def test_interrupted_download_goes_on(hub: Hub, api: HfApi, index: EntityIndex, empty_cache: Path):
    hub.fail_next("GET", "/objects/", status=403, skip=3, times=None)
    with pytest.raises(HfHubHTTPError):
        EntityIndex.from_pretrained(INDEX)
    hub.forget()
    EntityIndex.from_pretrained(INDEX).verify()


def test_revision_that_moves_between_listing_and_download(
    hub: Hub, api: HfApi, linker: Linker, data: dict[str, Any], tmp_path: Path
):
    """The files are those of the list, not those that took their place meanwhile."""
    index = EntityIndex.build(*linker, data["entities"], show_progress=False)
    index.push_to_hub("alice/moved", token=ALICE)
    small = EntityIndex.build(*linker, data["entities"][:2], show_progress=False)
    hub.forget()
    hub.delay_next("GET", "/api/datasets/alice/moved/", 2.0)
    opened: list[EntityIndex] = []
    reader = threading.Thread(
        target=lambda: opened.append(EntityIndex.from_pretrained("alice/moved", cache_dir=tmp_path / "cache"))
    )
    reader.start()
    hub.wait_for("GET", "/api/datasets/alice/moved/")
    small.push_to_hub("alice/moved", token=ALICE)
    reader.join()
    assert len(opened[0]) == 12
    opened[0].verify()
    assert len(EntityIndex.from_pretrained("alice/moved", cache_dir=tmp_path / "cache")) == 2


# What is not there, or not allowed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such", "There is no directory './no/such', and it is not the id"),
        ("a/b/c", "There is no directory 'a/b/c', and it is not the id"),
        ("alice/nothing", "the Hub shows no dataset repository of that name. If it is private, log in"),
        ("alice/linker", "There is a model of that name, but an index is a repository of its own"),
        ("alice/toys", "alice/toys on the Hub is not an entity index: it has no index_config.json"),
    ],
)
def test_what_is_no_index(api: HfApi, empty_cache: Path, name: str, message: str):
    with pytest.raises(EntityIndexError) as error:
        EntityIndex.from_pretrained(name)
    assert message in str(error.value)


def test_a_name_that_no_repository_can_have_is_not_asked_for(monkeypatch: pytest.MonkeyPatch):
    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(index_hub_mimic, "hf_hub_download", asked)
    with pytest.raises(EntityIndexError, match=r"There is no directory 'nothere', and it is not the id of a Hub"):
        EntityIndex.from_pretrained("nothere")


def test_a_default_index_that_cannot_be_had_is_named(linker: Linker, monkeypatch: pytest.MonkeyPatch):
    def offline(*args: Any, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(index_hub_mimic, "hf_hub_download", offline)
    model, processor = linker
    monkeypatch.setattr(model.config, "default_index", "alice/elsewhere")
    with pytest.raises(EntityIndexError, match=r"no network .* names 'alice/elsewhere' as its default .*`index=`"):
        MultimodalEntityLinkingPipeline(model=model, processor=processor)({"mention": "a", "text": "a"})


def test_index_of_another_model(api: HfApi, clean: ForkingPython, data: dict[str, Any], tmp_path: Path):
    error = clean.error(
        BY_ID.replace('"alice/linker"', "other"),
        other=save_linker(tmp_path / "other", seed=1),
        options={"index": INDEX},
        mentions=data["mentions"],
    )
    assert "made by the model 'alice/linker'" in error
    assert "EntityIndex.build" in error


def test_who_may_read(hub: Hub, api: HfApi, index: EntityIndex, empty_cache: Path):
    index.push_to_hub("alice/secret", token=ALICE, private=True)
    with pytest.raises(EntityIndexError, match="hf auth login"):
        EntityIndex.from_pretrained("alice/secret")
    with pytest.raises(EntityIndexError, match="pass `token`"):
        EntityIndex.from_pretrained("alice/secret", token=BOB)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        EntityIndex.from_pretrained("alice/secret", token="hf_wrong")
    with pytest.raises(LocalEntryNotFoundError, match="local_files_only"):
        EntityIndex.from_pretrained("alice/secret", token=ALICE, local_files_only=True)
    assert len(EntityIndex.from_pretrained("alice/secret", token=ALICE)) == 12
    assert len(EntityIndex.from_pretrained("alice/secret", local_files_only=True)) == 12

    index.push_to_hub("alice/gated", token=ALICE)
    hub.gate("alice/gated", repo_type="dataset")
    with pytest.raises(GatedRepoError, match="not in the authorized list"):
        EntityIndex.from_pretrained("alice/gated", token=BOB)


def test_who_may_write(api: HfApi, index: EntityIndex):
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        index.push_to_hub(INDEX, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="write access"):
        index.push_to_hub(INDEX, token=BOB)
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: draft"):
        index.push_to_hub(INDEX, token=ALICE, revision="draft")


def test_revisions_and_tags(api: HfApi, linker: Linker, index: EntityIndex, data: dict[str, Any], empty_cache: Path):
    index.push_to_hub("alice/tagged", token=ALICE)
    api.create_tag("alice/tagged", tag="v1", repo_type="dataset")
    EntityIndex.build(*linker, data["entities"][:2], show_progress=False).push_to_hub("alice/tagged", token=ALICE)
    assert len(EntityIndex.from_pretrained("alice/tagged")) == 2
    assert len(EntityIndex.from_pretrained("alice/tagged", revision="v1")) == 12
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: v2"):
        EntityIndex.from_pretrained("alice/tagged", revision="v2")


def test_a_file_is_missing_on_the_hub(api: HfApi, hub: Hub, index: EntityIndex, empty_cache: Path):
    index.push_to_hub("alice/holey", token=ALICE)
    part = min(name for name in hub.files("alice/holey", repo_type="dataset") if name.endswith(".jsonl"))
    api.delete_file(part, "alice/holey", repo_type="dataset")
    with pytest.raises(EntityIndexError, match=part):
        EntityIndex.from_pretrained("alice/holey")
