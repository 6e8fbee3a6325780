"""Programs at a console that cannot write every text, and options that are nearly right."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mel_archives import write_folder

from mimic_el import cli, console, train
from mimic_el.commands import link
from mimic_el.console import busy_machine, did_you_mean, parse, say
from mimic_el.datasets_scripts.prepare import main as prepare_main
from mimic_el.datasets_scripts.prepare import report_only


class _Kept(io.BytesIO):
    def close(self) -> None:
        """Stays readable."""


@contextlib.contextmanager
def strict_console() -> Iterator[io.BytesIO]:
    """What is written to standard streams that take cp1252 alone, as a Windows console's."""
    written = _Kept()
    stream = io.TextIOWrapper(written, "cp1252", "strict", write_through=True)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield written


POLISH = {
    "entities.csv": "id,name,images\ne1,Łódź,łódź.png\n".encode(),
    "train.csv": "mention,sentence,answer\nŁódź,miasto,e1\n".encode(),
}


def test_texts_of_the_data_do_not_end_a_program(tmp_path: Path) -> None:
    data = str(write_folder(POLISH, tmp_path / "data"))
    with strict_console() as written:
        report_only("custom", data, tmp_path / "problems.jsonl")  # with streams as they are
        assert prepare_main(["custom", "--data_dir", data, "--output_dir", str(tmp_path / "out")]) == 0
    printed = written.getvalue().decode("cp1252")
    assert printed.count("'\\u0141ód\\u017a'") == 2
    assert (tmp_path / "out" / "README.md").exists()


def test_say_writes_what_the_stream_has() -> None:
    for encoding, expected in (
        ("utf-8", "Łódź\n"),
        ("cp1252", "\\u0141ód\\u017a\n"),
        ("ascii", "\\u0141\\xf3d\\u017a\n"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        say("Łódź", stream)
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == expected


def test_json_of_linked_mentions_stays_json_on_any_stream() -> None:
    for encoding in ("utf-8", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        text = json.dumps({"name": "東京 😀"}, ensure_ascii=not console.takes_unicode(stream))
        stream.write(text)
        stream.flush()
        assert json.loads(stream.buffer.getvalue().decode(encoding)) == {"name": "東京 😀"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--keepnil"], "there is no option --keepnil. Did you mean --keep_nil?"),
        (["--zzz=1"], "there is no option --zzz.\n"),
        (["word"], "unrecognized arguments: word"),
    ],
)
def test_an_unknown_option_names_the_nearest(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--keep_nil", action="store_true")
    with pytest.raises(SystemExit):
        parse(parser, argv)
    assert message in capsys.readouterr().err


def test_did_you_mean() -> None:
    assert did_you_mean("wikimell", ["wikimel", "sample"]) == " Did you mean wikimel?"
    assert did_you_mean("zzz", ["wikimel"]) == ""


@pytest.mark.parametrize(
    ("load", "threads", "note"), [(0.2, 8, None), (6.0, 8, "OMP_NUM_THREADS=2 may be faster"), (6.0, 2, None)]
)
def test_a_shared_machine_is_noted(
    monkeypatch: pytest.MonkeyPatch, load: float, threads: int, note: str | None
) -> None:
    monkeypatch.setattr(console.os, "getloadavg", lambda: (load, load, load), raising=False)
    monkeypatch.setattr(console.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    found = busy_machine(threads)
    assert found is None if note is None else note in str(found)


def test_help_of_training_has_our_own_options_first() -> None:
    text = train.option_parser().format_help()
    places = [text.index(f"\n  --{name}") for name in ("backbone", "dataset_name", "eval_epochs", "logging_dir")
              if f"\n  --{name}" in text]  # fmt: skip
    titles = [text.index(title) for title in ("The model:", "The data:", "The training:", "Everything else")]
    assert titles[0] < places[0] < titles[1] < places[1] < titles[2] < places[2] < titles[3]
    assert text.startswith("usage: ")
    assert len(text.partition("\n\n")[0]) < 200
    # Each option is there once.
    assert text.count("\n  --learning_rate ") == 1
    assert text.count("\n  --fp16 ") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["wikimell"], "Did you mean wikimel?"),
        (["--learnin_rate", "1"], "Did you mean --learning_rate?"),
        (["--learning_rat", "1"], "There is no option '--learning_rat'. Did you mean --learning_rate?"),
        (["{tmp}/c.yaml"], "Did you mean learning_rate?"),
        (
            ["--dataset_name", "{tmp}/none", "--backbone", "x", "--output_dir", "{tmp}/o", "--use_cpu"],
            "cannot be loaded",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("dataset_name: x\nlearnin_rate: 1\n")
    with pytest.raises(SystemExit) as caught:
        train.run([word.replace("{tmp}", str(tmp_path)) for word in argv])
    assert caught.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: error: ")]
    assert message in line


@pytest.mark.parametrize(
    "command",
    [
        ("push", "--dry_run", "--model_dir", ""),
        ("push", "--dry_run", "--index_dir", ""),
        ("push", "--dry_run", "--dataset_dir", "one", ""),
        ("convert", "x.ckpt", "--clip", "clip.json", "--output_dir", ""),
        ("prepare", "custom", "--data_dir", "data", "--output_dir", ""),
        ("train", "--dataset_name", "x", "--backbone", "x", "--output_dir", ""),
        ("index", "build", "--model", "x", "--entities", "e.csv", "--output_dir", ""),
        ("link", "m.jsonl", "--model", "x", "--output_file", ""),
        ("calibrate", "--model", "x", "--mentions", "m.jsonl", "--output_dir", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_working_directory(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable that is not set: what is there would be published, or written over."""
    monkeypatch.chdir(tmp_path)
    code: Any
    try:
        code = cli.main(list(command))
    except SystemExit as ended:
        code = ended.code
    assert code not in (0, None)
    said = " ".join(capsys.readouterr().err.split())
    assert "is empty. Name" in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_data_controls_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b[2J\x9b1m\r\x7f\x00 \u202eb\u2066 \ud800 \u0142\t\n"
    expected = "a\\u001b[2J\\u009b1m\\u000d\\u007f\\u0000 \\u202eb\\u2066 \\ud800 \u0142\t\n"
    assert console.harmless(text) == expected
    console.say(text)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_links_shown_on_a_terminal_are_the_same_json(terminal: bool) -> None:
    class Output(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return terminal

    record = {"mention": "a\x1b[2J\x9b1m \u202eb"}
    line = link._linked_line("line 1", record, record, [], link.OnError.RAISE, Output())
    assert json.loads(line) == {**record, "entities": []}
    assert ("\x9b" in line) is not terminal
