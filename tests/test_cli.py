"""The console command, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from published import entities_and_mentions, save_linker
from toy_data import write_dataset

from mimic_el import EntityIndex, MimicModel, MimicProcessor, MultimodalEntityLinkingPipeline, cli
from mimic_el.errors_mimic import MimicError
from mimic_el.records_mimic import table_record

PROGRAMS = {
    "train": "mimic_el.train",
    "prepare": "mimic_el.datasets_scripts.prepare",
    "convert": "mimic_el.scripts.convert_original_checkpoint",
    "push": "mimic_el.scripts.push_to_hub",
    "sample": "mimic_el.scripts.demo",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a JSON Lines file of entities and one of mentions whose images lie beside them."""
    root = tmp_path_factory.mktemp("made")
    save_linker(root / "linker")
    (root / "tables" / "images").mkdir(parents=True)
    entities, mentions = entities_and_mentions(root / "tables" / "images")
    for name, records, column in (("entities", entities, "images"), ("mentions", mentions, "image")):
        lines = []
        for record in records:
            image = record.get(column)
            if image:
                paths = [f"images/{Path(path).name}" for path in (image if isinstance(image, list) else [image])]
                record = {**record, column: paths if column == "images" else paths[0]}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        (root / "tables" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Gives the one line with which the command refuses."""

    def refused(*arguments: object) -> str:
        assert run(*arguments) == 1
        output, errors = capsys.readouterr()
        assert output == ""
        *bars, said = errors.splitlines()
        assert said.startswith("error: ")
        assert all("[" in bar or not bar for bar in bars), errors  # progress bars
        return said

    return refused


def test_links_as_the_pipeline_does(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables, linker = made / "tables", made / "linker"
    index = tmp_path / "index"
    built = ("--entities", tables / "entities.jsonl", "--output_dir", index, "--dtype", "float32")
    assert run("index", "build", "--model", linker, *built) == 0
    entities, mentions = entities_and_mentions(tmp_path / "images")
    assert f"Wrote {len(entities)} entities" in capsys.readouterr().out
    model = MimicModel.from_pretrained(linker)
    processor = MimicProcessor.from_pretrained(linker, trust_remote_code=False)
    expected = MultimodalEntityLinkingPipeline(
        model=model, processor=processor, entities=entities, build_kwargs={"dtype": "float32"}
    )(mentions, top_k=3)

    capsys.readouterr()
    common = ("--model", linker, "--index", index, "--top_k", 3)
    assert run("link", tables / "mentions.jsonl", *common, "--batch_size", 2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["mention"] for line in lines] == [mention["mention"] for mention in mentions]
    for line, entities in zip(lines, expected, strict=True):
        assert [found["entity_id"] for found in line["entities"]] == [found["entity_id"] for found in entities]
        assert [found["score"] for found in line["entities"]] == pytest.approx([e["score"] for e in entities], abs=1e-4)

    one = mentions[0]
    image = ("--image", one["image"]) if one.get("image") else ()
    text = one.get("text") or one["sentence"]
    single = ("--mention", one["mention"], "--text", text, *image, "--output_file", tmp_path / "out.jsonl")
    assert run("link", *single, *common) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["entities"] == [
        {**found, **{name: pytest.approx(value, abs=1e-4) for name, value in found.items() if name.endswith("score")}}
        for found in expected[0]
    ]

    assert run("index", "info", index) == 0
    assert json.loads(capsys.readouterr().out)["entities"] == len(EntityIndex.from_pretrained(index))
    assert run("index", "verify", index) == 0
    assert "is whole" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    mentions, output = made / "tables" / "mentions.jsonl", tmp_path / "linked.jsonl"
    entities = ("--entities", made / "tables" / "entities.jsonl", "--output_file", output)
    common = ("--model", made / "linker", *entities, "--batch_size", 1)
    assert run("link", mentions, *common) == 0
    whole = output.read_bytes()
    first, second, *rest = whole.splitlines(keepends=True)

    asked: list[int] = []
    link = MultimodalEntityLinkingPipeline.__call__

    def counted(self: Any, inputs: Any, **options: Any) -> Any:
        asked.append(len(inputs))
        return link(self, inputs, **options)

    monkeypatch.setattr(MultimodalEntityLinkingPipeline, "__call__", counted)
    for there, left in ((first + second[:-9], 1 + len(rest)), (b"", 2 + len(rest)), (whole, 0)):
        output.write_bytes(there)
        asked.clear()
        assert run("link", mentions, *common, "--resume") == 0
        assert output.read_bytes() == whole
        assert sum(asked) == left
    for other in (second + first, whole + first, b"{}\n", b"\xff\n"):
        output.write_bytes(other)
        assert "is not what was linked of" in refused("link", mentions, *common, "--resume")
        assert output.read_bytes() == other
    assert "--resume goes on in an --output_file" in refused("link", mentions, "--model", made / "linker", "--resume")


def test_options_of_a_build_are_handed_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def build(model: Any, processor: Any, entities: Any, output_dir: Path, **options: Any) -> list[Any]:
        given = [options[name] for name in ("encoding_dtype", "num_workers", "compile_encoder")]
        calls.append((processor.fast_resize, *given))
        return []

    monkeypatch.setattr(EntityIndex, "build", build)
    tables = ("--entities", made / "tables" / "entities.jsonl", "--output_dir", tmp_path / "index")
    common = ("index", "build", "--model", made / "linker", *tables)
    assert run(*common) == 0
    assert run(*common, "--fast_resize", "--encoding_dtype", "bfloat16", "--num_workers", 1, "--compile") == 0
    assert calls == [(False, None, None, False), (True, "bfloat16", 1, True)]


def test_method_and_candidates_are_handed_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    class Pipeline:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def __call__(self, mentions: Any, **options: Any) -> Any:
            calls.append((mentions, options))
            return [[] for _ in mentions]

    monkeypatch.setattr("mimic_el.pipeline_mimic.MultimodalEntityLinkingPipeline", Pipeline)
    (tmp_path / "m.jsonl").write_text('{"mention": "A", "sentence": "A b.", "candidates": ["x"], "own": 3}\n')
    assert run("link", tmp_path / "m.jsonl", "--model", made / "linker", "--method", "exhaustive") == 0
    [mention], options = calls[1]
    assert mention == {"mention": "A", "sentence": "A b.", "candidates": ["x"]}
    common = {"top_k": 5, "batch_size": 32, "on_error": "return", "on_image_error": "raise"}
    assert options == {**common, "method": "exhaustive"}
    assert json.loads(capsys.readouterr().out)["own"] == 3


def test_documents_and_what_follows_from_bad_lines(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any
) -> None:
    common = ("--model", made / "linker", "--entities", made / "tables" / "entities.jsonl", "--top_k", 1)
    text = "Orange 0 beside Apple 3, in Georgia 1."
    assert run("link", "--text", text, *common) == 0
    [answer] = map(json.loads, capsys.readouterr().out.splitlines())
    assert [found["mention"] for found in answer["mentions"]] == ["Orange 0", "Apple 3", "Georgia 1"]
    lines = [
        {"text": text, "spans": [[0, 6]], "own": 1},
        {"mention": "Apple 3", "text": text, "image": "no.png"},
        {"mention": None, "text": text, "id": "x"},
        {"mention": "Apple 3", "text": text, "start": 16, "end": 23},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "m.jsonl, line 2: There is no image file" in refused("link", tmp_path / "m.jsonl", *common)
    options = ("--on_error", "warn", "--on_image_error", "warn", "--batch_size", 1)
    assert run("link", tmp_path / "m.jsonl", *common, *options) == 0
    said = capsys.readouterr()
    assert "warning: " + str(tmp_path / "m.jsonl, line 2: There is no image file") in said.err
    assert "m.jsonl, line 3: `mention` of a mention is missing" in said.err
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert answers[0]["own"] == 1
    assert [(m["start"], m["end"], len(m["entities"])) for m in answers[0]["mentions"]] == [(0, 6, 1)]
    assert [len(answer.get("entities", [])) for answer in answers] == [0, 1, 0, 1]
    assert run("link", tmp_path / "m.jsonl", *common, "--on_error", "return") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[1]["error"].endswith("no.png.")
    assert (answers[1]["error_type"], answers[2]["error_type"]) == ("MimicImageError", "MentionError")
    assert "entities" in answers[3]
    named = ("--candidates", "names", "--mention", "Apple 3", "--text", text, "--context_window", "mention")
    assert run("link", *common, *named, "--top_k", 5) == 0
    assert [found["name"] for found in json.loads(capsys.readouterr().out)["entities"]] == ["Apple 3"]
    assert "--mention_detector" in refused("link", "--text", text, *common, "--mention_detector", tmp_path / "none")


def test_tables_of_entities(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(
        "id,name,description,images,aliases\n1,Ann,A chemist,a.jpg|b.jpg,An|Anna\n2,Bo,,,\n"
    )
    (tmp_path / "e.jsonl").write_text('{"id": 1, "name": "Ann", "image": "http://x/a.jpg"}\n\n{"id": "2"}\n')
    table = cli.read_entities(str(tmp_path / "e.csv"))
    for _ in range(2):  # it is read anew
        first, second = table
        assert first["images"] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
        assert second == {"id": "2", "name": "Bo", "description": "", "images": [], "aliases": ""}
        assert [table_record(row).get("aliases") for row in (first, second)] == [["An", "Anna"], None]
    assert list(cli.read_entities(str(tmp_path / "e.jsonl"))) == [
        {"id": 1, "name": "Ann", "images": ["http://x/a.jpg"]},
        {"id": "2", "images": []},
    ]


def test_entities_of_a_directory_are_those_of_now(tmp_path: Path) -> None:
    directory = write_dataset(tmp_path / "toys")
    assert len({row["id"] for row in cli.read_entities(str(directory))}) > 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", '{"id": 1}\n{', "line 2: not JSON"),
        ("e.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("e.jsonl", "[1]\n", "line 1: not an object, but a list"),
        ("e.jsonl", '{"name": "Ann"}\n', "line 1: the entity has no `id`"),
        ("e.jsonl", '{"id": 1, "images": 5}\n', "`images` must be paths"),
        ("e.jsonl", "\udcff", "is not UTF-8"),
        ("e.csv", "id,name\n1\n", "line 2: not as many cells"),
        ("e.txt", "id", "its name must end in"),
    ],
)
def test_broken_tables(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(MimicError, match=message):
        list(cli.read_entities(str(tmp_path / name)))


def test_what_a_user_gets_wrong(made: Path, tmp_path: Path, refused: Any) -> None:
    model, index = ("--model", made / "linker"), ("--index", tmp_path / "none")
    single = ("--mention", "A", "--text", "A b.")
    assert "Give either a file of mentions" in refused("link", *model)
    assert "--mention needs --text" in refused("link", *model, "--mention", "A")
    assert "not both" in refused("link", *model, *single, *index, "--entities", "x.jsonl")
    assert "There is no file" in refused("link", *model, tmp_path / "none.jsonl")
    assert "There is no file" in refused("index", "build", *model, "--entities", "no.csv", "--output_dir", tmp_path)
    assert "is not a MIMIC checkpoint" in refused("link", "--model", tmp_path, *single, *index)
    assert "cannot be loaded" in refused("link", "--model", tmp_path / "none", *single, *index)
    assert "There is no device 'cud'" in refused("link", *model, *single, "--device", "cud")
    assert "there is no directory" in refused("link", *model, *single, "--output_file", tmp_path / "none" / "o.jsonl")
    assert "There is no device" in refused("index", "build", *model, "--entities", made / "tables" / "entities.jsonl",
                                           "--output_dir", tmp_path / "i", "--device", "cuda:99")  # fmt: skip
    (tmp_path / "m.jsonl").write_text('{"mention": "A", "text": "A b."}\n{"mention": " ", "text": "A b."}\n')
    entities = ("--entities", made / "tables" / "entities.jsonl")
    assert "line 2: `mention` is empty" in refused("link", tmp_path / "m.jsonl", *model, *entities)


def test_calibrates_a_checkpoint_in_place_or_elsewhere(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any
) -> None:
    entities, mentions = entities_and_mentions(tmp_path / "images", 40)
    rows = [
        {**m, "answer": e["id"] if n % 4 else None} for n, (e, m) in enumerate(zip(entities, mentions, strict=True))
    ]
    path = tmp_path / "mentions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2), encoding="utf-8")
    linker = save_linker(tmp_path / "linker")
    model, processor = (
        MimicModel.from_pretrained(linker),
        MimicProcessor.from_pretrained(linker, trust_remote_code=False),
    )
    EntityIndex.build(model, processor, entities, tmp_path / "index", dtype="float32", show_progress=False)
    before = json.loads((linker / "config.json").read_text())
    common = ("--model", linker, "--index", tmp_path / "index")
    assert run("calibrate", *common, "--mentions", path, "--output_dir", tmp_path / "out") == 0
    assert json.loads((linker / "config.json").read_text()) == before
    assert run("calibrate", *common, "--mentions", path) == 0
    assert '"ece":' in capsys.readouterr().out
    after = json.loads((linker / "config.json").read_text())
    block = after.pop("calibration")
    assert after == {name: value for name, value in before.items() if name != "calibration"}
    assert block == MimicModel.from_pretrained(tmp_path / "out").config.calibration
    assert block["nil_rate"] == 0.25  # as in the mentions

    path.write_text(json.dumps({"mention": "a", "text": "a"}) + "\n", encoding="utf-8")
    assert "line 1: the mention has no `answer`" in refused("calibrate", *common, "--mentions", path)
    assert "There is no file" in refused("calibrate", *common, "--mentions", tmp_path / "none.jsonl")
    assert "--output_dir" in refused("calibrate", "--model", "someone/there", "--mentions", path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]), encoding="utf-8")
    assert "20 mentions are too few" in refused("calibrate", *common, "--mentions", path)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_get_their_arguments_untouched(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    program = types.ModuleType(PROGRAMS[name])

    def main(argv: list[str]) -> int:
        given.append((argv, sys.argv[0]))
        return 3

    program.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PROGRAMS[name], program)
    monkeypatch.setattr(sys, "argv", ["x"])
    arguments = ["--help", "-x", "--a=b", "c d", "--top_k", "3"]
    assert run(name, *arguments) == 3
    assert given == [(arguments, f"mimic-el {name}")]


def test_training_names_the_configurations_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "nope") == 2
    [said] = capsys.readouterr().err.splitlines()
    assert "no configuration 'nope'" in said
    assert "sample, wikidiverse, wikimel" in said


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(argv: Any) -> None:
        raise KeyboardInterrupt

    program = types.ModuleType(PROGRAMS["sample"])
    program.main = interrupt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PROGRAMS["sample"], program)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert run("sample") == 130


def test_help_is_cheap() -> None:
    """`prepare --help` is prepare's own, and loads neither torch nor transformers."""
    program = """
import sys
from mimic_el.cli import main
for arguments in (["--version"], ["--help"], ["index", "build", "--help"], ["prepare", "--help"]):
    assert main(arguments) == 0, arguments
assert main(["nope"]) == 2
assert not {"torch", "transformers"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("mimic-el 0.")
    assert "--max_shard_size" in result.stdout


def test_images_of_a_table_lie_in_its_folder_unless_another_is_named(
    made: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    image = next((made / "tables" / "images").iterdir())
    table = tmp_path / "tables" / "entities.jsonl"
    table.parent.mkdir()
    table.write_text(json.dumps({"id": "a", "name": "b", "images": [str(image)]}), encoding="utf-8")

    def unread(*options: object) -> list[str]:
        recwarn.clear()
        place = ("--entities", table, "--output_dir", tmp_path / "index", "--overwrite")
        assert run("index", "build", "--model", made / "linker", *place, *options) == 0
        return [str(warning.message) for warning in recwarn if "image" in str(warning.message)]

    assert f"is not in the folder {table.parent}" in unread()[0]
    assert unread("--image_root", image.parent) == []
    table.write_text(json.dumps({"id": "a", "name": "b", "images": ["http://127.0.0.1:9/a.png"]}), encoding="utf-8")
    assert "URLs are not read here" in unread()[0]
    assert "an address of this machine" in unread("--allow_urls", "public")[0]
    assert "cannot be downloaded" in unread("--allow_urls", "private")[0]
