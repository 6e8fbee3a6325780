"""The command: what it writes, refuses, resumes and uploads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from hub_server import Hub
from mel_archives import Files, an_image, noise, sound_archive, to_json, write_folder
from test_archives import png_with
from test_sources import planted_archive

from mimic_el.datasets_scripts import prepare as module
from mimic_el.datasets_scripts.builders import load_raw
from mimic_el.datasets_scripts.prepare import Options, PrepareError, main, prepare, push
from mimic_el.hub_files_mimic import HubFilesError

# The command without the package's model, which takes seconds to import and is not used.
RUN = f"""
import sys, types
sys.modules["mimic_el"] = package = types.ModuleType("mimic_el")
package.__path__ = [{str(Path(__file__).parents[1])!r}]
from mimic_el.datasets_scripts.prepare import main
sys.exit(main(sys.argv[1:]))
"""

# The same, but it hardly goes on once there are so many files, until somebody ends it.
RUN_SLOWLY = """
import os, pathlib, signal, time
from mimic_el.datasets_scripts.shards import Manifest
signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background ignores
save, out, files = Manifest.save, pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]), int(os.environ["FILES"])
def slowly(self):
    save(self)
    if len(list(out.rglob("kb-*.parquet"))) >= files:
        time.sleep(1)
Manifest.save = slowly
"""

# What a reader does, with nothing of ours installed.
READER = """
import json, os, sys
sys.modules["mimic_el"] = None
from datasets import Image, List, load_dataset
folder = sys.argv[1]
mentions = load_dataset(folder, "mentions")
entities = load_dataset(folder, "entities", split="kb")
streamed = load_dataset(folder, "mentions", split="test", streaming=True)
print(json.dumps({
    "features": [str(mentions["train"].features), str(entities.features)],
    "mentions": {split: rows.remove_columns("image")[:] for split, rows in mentions.items()},
    "sizes": [row["image"] and row["image"].size for row in mentions["train"]],
    "entities": entities.remove_columns("images")[:],
    "images": [[image.size for image in row["images"]] for row in entities],
    "streamed": [row["id"] for row in streamed],
}), flush=True)
os._exit(0)  # threads of the libraries that stream may abort an interpreter that ends
"""


def many_images(count: int) -> Files:
    """Own data with an image of 12 kB for each of `count` entities."""
    rows = [{"id": f"e{number}", "name": f"Entity {number}", "images": [f"{number}.png"]} for number in range(count)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    mentions = "".join(f"Entity,Entity {number},e{number}\n" for number in range(count))
    files = {"entities.jsonl": lines.encode(), "mentions.csv": b"mention,sentence,answer\n" + mentions.encode()}
    return files | {f"images/{number}.png": noise(number) for number in range(count)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of the archive with everything wrong."""
    folder = tmp_path_factory.mktemp("planted")
    prepare("richpediamel", planted_archive(folder), folder / "out", Options(num_workers=2))
    return folder / "out"


def test_output_is_read_where_nothing_of_ours_is_installed(planted: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(planted)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert [len(rows["id"]) for rows in read["mentions"].values()] == [11, 1, 1]
    assert read["mentions"]["test"] == {
        "id": ["test-0"],
        "mention": ["Bén"],
        "sentence": ["Bén"],
        "answer": ["1"],
        "start": [0],
        "end": [3],
        "source_id": [None],
    }
    assert read["streamed"] == ["test-0"]
    assert [size for size in read["sizes"] if size] == [[8, 6]] * 4
    assert read["entities"]["id"] == [str(number) for number in (*range(9), *range(11, 17))]
    assert read["entities"]["name"][:2] == ["Anna Alpha", "Ben Beta"]
    assert [len(images) for images in read["images"]] == [2, 1, *[0] * 6, 1, *[0] * 5, 1]
    assert "'image': Image(" in read["features"][0]
    assert "'images': List(Image(" in read["features"][1]


def test_output_has_report_problems_and_card(planted: Path) -> None:
    report = json.loads((planted / "report.json").read_text())
    problems = [json.loads(line) for line in (planted / "problems.jsonl").read_text().splitlines()]
    assert sum(report["problems"].values()) == len(problems)
    assert report["problems"]["missing_image"] == 2
    card = (planted / "README.md").read_text()
    assert "| missing_image | 2 | images that are named and not there |" in card
    # Nothing in what is uploaded tells of this machine.
    for path in planted.rglob("*"):
        if path.is_file() and path.suffix in (".md", ".json", ".jsonl") and ".prepare" not in path.parts:
            assert str(planted.parent) not in path.read_text()


def test_command_reports_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_folder(sound_archive(), tmp_path / "data"), tmp_path / "out"
    assert main(["wikimel", "--data_dir", str(data), "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "WikiMEL: the archive of the MIMIC authors" in printed
    assert "entities: 4 (published: 109,976)" in printed
    assert f"Written to {out}" in printed
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.parquet")) == [
        "entities/kb-00000-of-00001.parquet",
        "mentions/test-00000-of-00001.parquet",
        "mentions/train-00000-of-00001.parquet",
        "mentions/validation-00000-of-00001.parquet",
    ]


def test_images_keep_their_bytes_or_are_shrunk(tmp_path: Path) -> None:
    files = sound_archive() | {"mention_image/m0.jpg": an_image(5, (300, 200))}
    data = write_folder(files, tmp_path / "data")
    for name, options in (("a", Options()), ("b", Options(image_size=30))):
        prepare("wikimel", data, tmp_path / name, options)
    raw = datasets.Image(decode=False)
    whole = datasets.load_dataset(str(tmp_path / "a"), "mentions", split="train").cast_column("image", raw)
    assert [image and image["bytes"] for image in whole["image"]] == [an_image(5, (300, 200)), an_image(6), None]
    small = datasets.load_dataset(str(tmp_path / "b"), "mentions", split="train")
    assert [image and image.size for image in small["image"]] == [(30, 20), (8, 6), None]


def test_an_image_with_broken_metadata_is_stored_so_that_it_can_be_read(tmp_path: Path) -> None:
    broken = png_with(b"eXIf", b"XX*\0zzzz")
    data = write_folder(sound_archive() | {"mention_image/m0.jpg": broken}, tmp_path / "data")
    report = prepare("wikimel", data, tmp_path / "out")
    assert report.counts["broken_metadata"] == 2
    raw, _ = load_raw("wikimel", data, cache_dir=str(tmp_path / "cache"))
    for mentions in (datasets.load_dataset(str(tmp_path / "out"), "mentions"), raw):
        assert [row["image"] and row["image"].size for row in mentions["train"]] == [(8, 8), (8, 6), None]


def test_report_only_writes_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = planted_archive(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["richpediamel", "--data_dir", str(data), "--report_only"]) == 0
    assert "unsafe_image_path" in capsys.readouterr().out
    assert set(tmp_path.rglob("*")) - set(before) == {tmp_path / "richpediamel-problems.jsonl"}
    assert main(["richpediamel", "--data_dir", str(data), "--report_only", "--strict"]) == 1


def test_strict_refuses_errors_and_allows_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = planted_archive(tmp_path), tmp_path / "out"
    assert main(["richpediamel", "--data_dir", str(data), "--output_dir", str(out), "--strict"]) == 1
    assert "Nothing was written, because of --strict: 1 duplicate_key" in capsys.readouterr().err
    assert not list(out.rglob("*.parquet"))
    assert (out / "problems.jsonl").exists()
    sound = write_folder(sound_archive(), tmp_path / "sound")
    assert main(["wikimel", "--data_dir", str(sound), "--output_dir", str(tmp_path / "b"), "--strict"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WIKIMEL_dev.json": b"[1,\n2,]"}, "WIKIMEL_dev.json: line 2, column"),
        ({"qid2id.json": None}, "qid2id.json: not in"),
    ],
)
def test_fatal_findings_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, bytes | None], message: str
) -> None:
    files = {name: data for name, data in {**sound_archive(), **changes}.items() if data is not None}
    data, out = write_folder(files, tmp_path / "data"), tmp_path / "out"
    assert main(["wikimel", "--data_dir", str(data), "--output_dir", str(out)]) == 1
    printed = capsys.readouterr()
    assert message in printed.out
    assert "Nothing was written" in printed.err
    assert not list(out.rglob("*.parquet"))


def test_second_run_writes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_folder(sound_archive(), tmp_path / "data"), tmp_path / "out"
    prepare("wikimel", data, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}

    def fail(*args: object) -> None:
        raise AssertionError("an image was checked again")

    monkeypatch.setattr(module, "inspect_image", fail)
    prepare("wikimel", data, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == stamps


def test_output_of_another_input_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_folder(sound_archive(), tmp_path / "data"), tmp_path / "out"
    prepare("wikimel", data, out)
    arguments = ["wikimel", "--data_dir", str(data), "--output_dir", str(out)]
    assert main([*arguments, "--image_size", "8"]) == 1
    assert "another input or other options" in capsys.readouterr().err
    (data / "WIKIMEL_dev.json").write_bytes(to_json([]))
    assert main(arguments) == 1
    write_folder({"mine.txt": b""}, tmp_path / "mine")
    assert main([*arguments[:-1], str(tmp_path / "mine")]) == 1
    assert "was not written by this command" in capsys.readouterr().err


def run_until(data: Path, out: Path, files: int, stop: signal.Signals) -> tuple[int, str]:
    """Start the command, with a file for each entity, and send `stop` when there are `files` of them."""
    arguments = ["custom", "--data_dir", str(data), "--output_dir", str(out), "--max_shard_size", "1KB"]
    code = RUN.replace("sys.exit(", RUN_SLOWLY + "sys.exit(")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "FILES": str(files)},
    )
    deadline = time.monotonic() + 60
    while len(list(out.rglob("kb-*.parquet"))) < files and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    count = 80
    data, out = write_folder(many_images(count), tmp_path / "data"), tmp_path / "out"
    stamps: dict[Path, int] = {}

    def written_anew() -> int:
        """How many files changed since the last interruption."""
        now = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
        return len(stamps.items() - now.items())

    for stop, code, reached in ((signal.SIGKILL, -signal.SIGKILL, 4), (signal.SIGINT, 130, 20)):
        returned, output = run_until(data, out, reached, stop)
        assert returned == code, output
        assert ("run the same command again" in output) == (stop == signal.SIGINT)
        recorded = json.loads((out / ".prepare" / "manifest.json").read_text())["shards"]
        assert reached - 1 <= len(recorded) < count, "the run was not interrupted in the middle"
        assert not (out / "README.md").exists()
        assert written_anew() <= 1  # the one that was complete and not yet recorded
        stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}

    prepare("custom", data, out, Options(max_shard_bytes=1000))
    assert written_anew() <= 1
    prepare("custom", data, tmp_path / "whole", Options(max_shard_bytes=1000))
    names = sorted(path.relative_to(out) for path in out.rglob("*.parquet"))
    assert sum(name.name.startswith("kb-") for name in names) == count
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(out.rglob("*.incomplete"))


def test_interrupted_check_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_folder(many_images(60), tmp_path / "data"), tmp_path / "out"
    (data / "images" / "3.png").write_bytes(noise(3)[:-6000])
    checked: list[bytes] = []
    inspect = module.inspect_image

    def interrupt(image: bytes, limit: int) -> tuple[str, str] | None:
        checked.append(image)
        if len(checked) == 40:
            raise KeyboardInterrupt
        return inspect(image, limit)

    monkeypatch.setattr(module, "inspect_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare("custom", data, out, Options(num_workers=1))
    assert not (out / "problems.jsonl").exists()
    again = prepare("custom", data, out, Options(num_workers=1))
    assert again.counts == {"unreadable_image": 1, "closed_knowledge_base": 1}
    # Two groups of sixteen were complete and are not read again.
    assert [checked.count(noise(number)) for number in range(32) if number != 3] == [1] * 31
    # Of the third group, which was interrupted, any part may have been read before.
    assert 60 < len(checked) <= 48 + 60 - 32


def test_data_that_change_while_they_are_read_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_folder(many_images(3), tmp_path / "data")
    validate = module.validate

    def then_change(*args: object) -> object:
        sizes = validate(*args)  # type: ignore[arg-type]
        (data / "entities.jsonl").write_text('{"id": "e0", "name": "Entity"}\n')
        return sizes

    monkeypatch.setattr(module, "validate", then_change)
    with pytest.raises(PrepareError, match="the data changed while it was read"):
        prepare("custom", data, tmp_path / "out")


def test_empty_splits_are_left_out(tmp_path: Path) -> None:
    files = {
        "entities.csv": b"id,name\n1,Ann\n",
        "train.csv": b"mention,sentence,answer\nAnn,Ann,1\n",
    }
    data = write_folder(files, tmp_path / "data")
    report = prepare("custom", data, tmp_path / "out")
    assert report.counts == {"empty_split": 2, "closed_knowledge_base": 1}
    mentions = datasets.load_dataset(str(tmp_path / "out"), "mentions")
    assert {split: len(rows) for split, rows in mentions.items()} == {"train": 1}
    raw, _ = load_raw("custom", data, cache_dir=str(tmp_path / "cache"))
    assert raw["train"][0]["mention"] == mentions["train"][0]["mention"]
    assert set(raw) == {"train"}


def test_mentions_of_no_entity_are_kept_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "entities.csv": b"id,name\n1,Ann\n",
        "train.csv": b"mention,sentence,answer,kind\nAnn,Ann,1,person\nNo one,No one,nil,\n",
    }
    data = write_folder(files, tmp_path / "data")
    arguments = ["custom", "--data_dir", str(data), "--output_dir", str(tmp_path / "out"), "--keep_nil"]
    assert main(arguments) == 0
    assert "Rows of mentions: 2 read, 2 kept, 0 left out." in capsys.readouterr().out
    mentions = datasets.load_dataset(str(tmp_path / "out"), "mentions", split="train")
    assert mentions["answer"] == ["1", None]
    assert mentions["kind"] == ["person", None]
    assert main(arguments[:-1]) == 1  # of other options
    raw, _ = load_raw("custom", data, keep_nil=True, cache_dir=str(tmp_path / "cache"))
    assert raw["train"]["answer"] == ["1", None]


def test_nothing_usable_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"entities.csv": b"id,name\n1,Ann\n", "train.csv": b"mention,sentence,answer\nAnn,Ann,2\n"}
    data = write_folder(files, tmp_path / "data")
    assert main(["custom", "--data_dir", str(data), "--output_dir", str(tmp_path / "out")]) == 1
    assert "Nothing was written: no_rows" in capsys.readouterr().err


def test_own_data_as_documented(tmp_path: Path) -> None:
    documentation = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
    tables = [block.partition("```")[0] for block in documentation.split("```csv\n")[1:]]
    files = {"entities.csv": tables[0].encode(), "mentions.csv": tables[1].encode()}
    files |= {f"images/{name}.jpg": an_image() for name in ("ann", "ann-at-work", "prize")}
    report = prepare("custom", write_folder(files, tmp_path / "data"), tmp_path / "out", Options(strict=True))
    assert report.counts == {"empty_split": 2, "closed_knowledge_base": 1}
    assert report.to_dict()["entity_images"] == 2
    assert report.statistics.mentions_with_image["train"] == 1


def test_push_to_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann", token="hf_ann"))
    data = write_folder(many_images(8), tmp_path / "data")
    arguments = ["custom", "--data_dir", str(data), "--push_to_hub", "ann/own", "--private"]
    assert main([*arguments, "--output_dir", str(tmp_path / "a"), "--max_shard_size", "50KB"]) == 0
    first = hub.files("ann/own", repo_type="dataset")
    assert "README.md" in first
    assert "problems.jsonl" in first
    assert not [name for name in first if name.startswith(".prepare")]
    # Another cut of the same data leaves no file of the first.
    assert main([*arguments, "--output_dir", str(tmp_path / "b")]) == 0
    names = [name for name in hub.files("ann/own", repo_type="dataset") if name.endswith(".parquet")]
    assert sorted(names) == ["entities/kb-00000-of-00001.parquet"] + [
        f"mentions/{split}-00000-of-00001.parquet" for split in ("test", "train")
    ]
    entities = datasets.load_dataset("ann/own", "entities", split="kb")
    assert entities["id"] == [f"e{number}" for number in range(8)]


def test_push_sends_nothing_from_outside_of_the_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.add_user("eve", token="hf_eve"))
    folder = write_folder({"data.txt": b"1"}, tmp_path / "out")
    write_folder({"secret.txt": b"secret"}, tmp_path)
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(HubFilesError, match=r"notes\.txt is a symbolic link"):
        push(folder, "eve/own")
    (folder / "notes.txt").unlink()
    push(folder, "eve/own")
    assert set(hub.files("eve/own", repo_type="dataset")) - {".gitattributes"} == {"data.txt"}


def test_usage_names_the_command_that_was_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mimic-el prepare"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: mimic-el prepare [-h]")


def test_failed_upload_says_so(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(sound_archive(), tmp_path / "data")
    arguments = ["wikimel", "--data_dir", str(data), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--push_to_hub", "nobody/nothing"]) == 1
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # known before the work, not after it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wikimel", "--data_dir", "."], "give --output_dir, --push_to_hub or --report_only"),
        (["wikimel", "--output_dir", "x"], "--data_dir"),
        (["wikinews", "--data_dir", "."], "invalid choice: 'wikinews'"),
        (["wikimel", "--data_dir", ".", "--output_dir", "x", "--image_size", "0"], "0 is not a positive number"),
        (["wikimel", "--data_dir", ".", "--output_dir", "x", "--max_shard_size", "big"], "not a size such as 500MB"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wikimel", "--data_dir", str(tmp_path / "no"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "does not exist; give a folder, a .zip or a .tar" in capsys.readouterr().err
