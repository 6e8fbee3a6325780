"""Runs the Python of README.md and docs/, and checks the commands, tables of options and links in them.

The Python blocks of a page run in order, in one process and one namespace, in a directory that has what `WORLD` says,
with a Hub where "alice" is logged in. A block with prompts (`>>>`) must print what it shows; `...` stands for anything.
In a page, a comment before a block tells of exceptions, and is not shown:

    <!-- test: skip -->              the next block is not run, nor its commands checked
    <!-- test: run                   this is run as if it were a block of the page
    code
    -->

Of the commands in `bash` blocks, scripts, modules, targets of make, subcommands of mimic-el, options and configuration
files must exist. A comment before a table says whose options its first column names:

    <!-- test: options of push -->                 they exist: a subcommand of mimic-el (index.build for two words), or
    <!-- test: options of EntityIndex.build -->    a public name of the package, called
    <!-- test: all options of linker -->           and there are no others
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import Hub
from mel_archives import sound_archive, tar_bytes
from PIL import Image
from published import ROOT, TASK, save_linker
from python_processes import ForkingPython, own_python
from toy_data import entities, write_dataset
from transformers import HfArgumentParser, pipeline

import mimic_el
from mimic_el import Calibration, train
from mimic_el.calls_mimic import checked_call
from mimic_el.training import MimicTrainingArguments

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# Each kind of thing that a page may speak of, and the names that pages give it.
WORLD = {
    "checkpoint, with its index in `index`": ["runs/demo", "runs/wikimel"],
    "data set": ["data/wikimel", "data/mine", "FOLDER or REPOSITORY"],
    "image": ["photo.png", "docs/photo.png"],
    "archive of WikiMEL": ["WikiMEL.tar"],
}
TOKEN = "hf_alice"
# Of the checkpoint: training leaves a calibrated one.
CALIBRATION = Calibration(
    depth=16,
    nil_rate=0.2,
    evidence={},
    lines={"nil": (-2.0,), "rest": (-9.0,), "sharpness": (0.0,)},
    thresholds=tuple(1 - percent / 100 for percent in range(1, 96)),
    mentions=200,
    index={"entities": 9, "dtype": "float16", "ids": []},
)
# The programs that subcommands of mimic-el stand for, where these hand their arguments on.
PROGRAMS = {
    "train": "train.py",
    "prepare": "datasets_scripts/prepare.py",
    "convert": "scripts/convert_original_checkpoint.py",
    "push": "scripts/push_to_hub.py",
    "sample": "scripts/demo.py",
}


@dataclass
class Block:
    """A block of a page: its language, its lines, and where the first of them is (from 1)."""

    language: str
    text: str
    line: int


class PageError(ValueError):
    """A page that cannot be understood."""


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that are not to be skipped, with the hidden ones as "python"."""
    lines = text.splitlines()
    found: list[Block] = []
    skip, number = False, 0
    while number < len(lines):
        line = lines[number]
        fence = re.match(r"( *)(`{3,}|~{3,})([\w-]*)", line)
        directive = re.fullmatch(r"<!-- test: (skip -->|run|(?:all )?options of \S+ -->)", line.strip())
        if fence:
            body, number = _until(lines, number + 1, re.compile(rf" *{fence[2]} *"), fence[0])
            if not skip:
                start = number - len(body)
                found.append(Block(fence[3], "\n".join(row.removeprefix(fence[1]) for row in body), start + 1))
            skip = False
        elif directive and directive[1] == "run":
            body, number = _until(lines, number + 1, re.compile("-->"), line)
            found.append(Block("python", "\n".join(body), number - len(body) + 1))
        elif directive and directive[1] == "skip -->":
            skip = True
        elif directive:
            pass  # of a table
        elif "<!-- test" in line:
            raise PageError(f"line {number + 1}: {line.strip()} is not a directive")
        number += 1
    if skip:
        raise PageError("there is no block after the last `test: skip`")
    return found


def _until(lines: list[str], start: int, end: re.Pattern[str], what: str) -> tuple[list[str], int]:
    for number in range(start, len(lines)):
        if end.fullmatch(lines[number]):
            return lines[start:number], number
    raise PageError(f"line {start}: {what} is not closed")


def problems_of_commands(text: str) -> list[str]:
    """What is wrong with the commands of a `bash` block."""
    problems = []
    for command in text.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        while words and (re.fullmatch(r"\w+=\S*", words[0]) or words[0] in ("$", "time")):
            words = words[1:]  # variables that are set for the command
        if words[:1] == ["make"]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            problems += [f"make has no target {name}" for name in words[1:] if name[0] != "-" and name not in targets]
        if words[:1] == ["mimic-el"]:
            problems += problems_of_subcommand(words[1:])
        if not words or not re.fullmatch(r"(\S*/)?python3?", words[0]):
            continue
        if words[1:2] == ["-m"]:
            module, arguments = words[2], words[3:]
            spec = importlib.util.find_spec(module)
            script = Path(spec.origin) if spec and spec.origin else None
            if script is None:
                problems.append(f"there is no module {module}")
                continue
            if not script.is_relative_to(ROOT):
                continue
        else:
            script, arguments = ROOT / words[1], words[2:]
            if not script.is_file():
                problems.append(f"there is no script {words[1]}")
                continue
        problems += problems_of_arguments(str(script.relative_to(ROOT)), arguments, options_of(script))
    return problems


def problems_of_arguments(program: str, arguments: list[str], options: set[str]) -> list[str]:
    problems = []
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options:
            problems.append(f"{program} has no option {option}")
        elif word.endswith((".yaml", ".yml")) and not (ROOT / word).is_file():
            problems.append(f"there is no file {word}")
    return problems


def problems_of_subcommand(words: list[str]) -> list[str]:
    """What is wrong with what follows `mimic-el`."""
    if not words or words[0].startswith("-"):
        return []
    try:
        return problems_of_arguments(f"mimic-el {words[0]}", words[1:], options_of_subcommand(*words))
    except LookupError as error:
        return [str(error)]


def options_of_subcommand(*words: str) -> set[str]:
    """The long options of the subcommand that the first words name, with those of the program that it stands for.

    Raises:
        LookupError: if there is no such subcommand.
    """
    from typer.main import get_command

    name, command = "mimic-el", get_command(importlib.import_module("mimic_el.cli").app)
    for word in words:
        commands = getattr(command, "commands", None)  # of a group
        if commands is None:
            break
        if word not in commands:
            raise LookupError(f"{name} has no subcommand {word}")
        name, command = f"{name} {word}", commands[word]
    options = {option for one in command.params for option in [*one.opts, *one.secondary_opts] if option[:2] == "--"}
    if command.context_settings.get("ignore_unknown_options") and words[0] in PROGRAMS:
        options |= options_of(ROOT / PROGRAMS[words[0]])
    return options | {"--help"}


@dataclass
class OptionTable:
    """A table whose first column names options: whose, which, and whether there are to be no others."""

    owner: str
    names: list[str]
    complete: bool
    line: int


def option_tables(text: str) -> list[OptionTable]:
    lines = text.splitlines()
    tables = []
    for number, line in enumerate(lines):
        directive = re.fullmatch(r"<!-- test: (all )?options of (\S+) -->", line.strip())
        if not directive:
            continue
        rows = iter(lines[number + 1 :])
        row = next((row for row in rows if row.strip()), "")
        names: list[str] = []
        next(rows, None)  # the line below the head
        if not row.startswith("|"):
            raise PageError(f"line {number + 1}: there is no table after {line.strip()}")
        for row in rows:
            if not row.startswith("|"):
                break
            # `--top_k 5` names --top_k
            names += [name.split()[0] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
        tables.append(OptionTable(directive[2], names, bool(directive[1]), number + 1))
    return tables


def options_of_owner(owner: str) -> set[str]:
    """The options of a subcommand (with and without their dashes), or the arguments of a public name.

    Raises:
        LookupError: if it is neither.
    """
    if owner == "linker":
        return set(inspect.signature(checked_call).parameters) - {"config", "unknown"}
    first, _, rest = owner.partition(".")
    if first not in mimic_el.__all__:
        options = options_of_subcommand(*owner.split("."))
        return options | {option[2:] for option in options}
    value = getattr(mimic_el, first)
    for part in filter(None, rest.split(".")):
        value = getattr(value, part)
    return set(inspect.signature(value).parameters) - {"self"}


def problems_of_table(table: OptionTable) -> list[str]:
    try:
        options = options_of_owner(table.owner)
    except LookupError as error:
        return [str(error)]
    problems = [f"{table.owner} has no option {name}" for name in table.names if name not in options]
    if table.complete:
        named = {name.removeprefix("--").removeprefix("no-") for name in table.names} | {"help"}
        others = {option.removeprefix("--").removeprefix("no-") for option in options} - named
        problems += [f"the table does not name {name}, an option of {table.owner}" for name in sorted(others)]
    return problems


def options_of(script: Path) -> set[str]:
    """The long options of a program of this project."""
    if script == ROOT / "train.py":
        parser = HfArgumentParser((train.ModelArguments, train.DataArguments, MimicTrainingArguments))  # type: ignore[arg-type]
        return {option for action in parser._actions for option in action.option_strings}
    sources = [script]
    if script.parent == ROOT / "benchmarks":
        sources.append(script.parent / "bench_data.py")  # has the options that all benchmarks share
    named = {name for path in sources for name in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))}
    return named | {f"--no-{name[2:]}" for name in named} | {"--help"}


RUN = """
    import doctest

    class Runner(doctest.DocTestRunner):
        def report_failure(self, out, test, example, got):
            line = test.lineno + example.lineno + 1
            raise AssertionError(f"{page}, line {line}: expected\\n{example.want}got\\n{got}")

        def report_unexpected_exception(self, out, test, example, exc_info):
            raise exc_info[1]

    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names = {"__name__": "__main__"}
    for line, text in blocks:
        if ">>> " in text:
            test = doctest.DocTestParser().get_doctest(text, names, page, page, line - 1)
            Runner(optionflags=flags).run(test, clear_globs=False)
            names.update(test.globs)
        else:
            exec(compile("\\n" * (line - 1) + text, page, "exec"), names)
"""


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind in `WORLD`."""
    directory = tmp_path_factory.mktemp("things")
    checkpoint = save_linker(directory / "checkpoint")
    linker = pipeline(TASK, model=str(checkpoint), entities=entities(), trust_remote_code=True)
    linker.model.config.calibration = CALIBRATION.to_dict()
    linker.save_pretrained(checkpoint, save_index=True)
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    write_dataset(directory / "dataset")
    Image.new("RGB", (40, 30), "orange").save(directory / "photo.png")
    (directory / "archive.tar").write_bytes(tar_bytes(sound_archive()))
    return directory


@pytest.fixture
def world(things: Path, tmp_path: Path) -> Path:
    for source, names in zip(("checkpoint", "dataset", "photo.png", "archive.tar"), WORLD.values(), strict=True):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (things / source).is_dir() else shutil.copy)(things / source, tmp_path / name)
    return tmp_path


@pytest.fixture
def python(hub: Hub) -> ForkingPython:
    hub.reset()
    hub.add_user("alice", token=TOKEN)
    return own_python(hub)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(read(page)))])
def test_python(python: ForkingPython, world: Path, page: str):
    blocks = [(block.line, block.text) for block in blocks_of(read(page)) if block.language == "python"]
    python.run(RUN, token=TOKEN, folder=world, page=page, blocks=blocks)


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str):
    problems = [
        f"{page}, block at line {block.line}: {problem}"
        for block in blocks_of(read(page))
        if block.language in ("bash", "sh", "shell", "console")
        for problem in problems_of_commands(block.text)
    ]
    assert not problems


@pytest.mark.parametrize("page", [page for page in PAGES if option_tables(read(page))])
def test_tables_of_options(page: str):
    problems = [
        f"{page}, table at line {table.line}: {problem}"
        for table in option_tables(read(page))
        for problem in problems_of_table(table)
    ]
    assert not problems


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str):
    text = re.sub(r"^(`{3,}).*?^\1", "", read(page), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|<img[^>]*\bsrc=\"([^\"]+)\"", text)
    local = {one or other for one, other in targets if not re.match(r"[a-z]+:", one or other)}
    missing = []
    for target in local:
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        known = anchors(file.read_text(encoding="utf-8")) if anchor and file.suffix == ".md" and file.exists() else ()
        if not file.exists() or (known and anchor not in known):
            missing.append(target)
    assert not missing


def anchors(text: str) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The runner itself

PAGE = """
# Page

```python
value = 1
```

<!-- test: skip -->

```python
raise ValueError
```

- a list:
  ```python
  value += 1
  ```

<!-- test: run
value += 1
-->

```text
not code
```

```bash
python train.py
```
"""


def test_blocks_of_a_page():
    blocks = [(block.language, block.text, block.line) for block in blocks_of(PAGE)]
    assert blocks == [
        ("python", "value = 1", 5),
        ("python", "value += 1", 16),
        ("python", "value += 1", 20),
        ("text", "not code", 24),
        ("bash", "python train.py", 28),
    ]


@pytest.mark.parametrize("text", ["```python\n1", "<!-- test: run\n1", "<!-- test: skip -->", "<!-- test: stop -->"])
def test_page_that_cannot_be_understood(text: str):
    with pytest.raises(PageError):
        blocks_of(text)


def test_failures_are_told_with_their_line(python: ForkingPython, world: Path):
    good = [(5, "value = 1"), (9, ">>> value + 1\n2\n>>> print('a b')\na ...\n")]
    python.run(RUN, page="PAGE", blocks=good)
    assert "PAGE, line 9: expected\n3\ngot\n2" in python.error(RUN, page="PAGE", blocks=[(9, ">>> 1 + 1\n3\n")])
    with pytest.raises(AssertionError, match='File "PAGE", line 10'):
        python.run(RUN, page="PAGE", blocks=[(9, "value = 1\nvalue / 0")])
    assert python.error(RUN, page="PAGE", blocks=[(9, ">>> 1 / 0\n")]) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("command", "problems"),
    [
        (
            "python train.py configs/sample.yaml \\\n  --output_dir out --no_such 1",
            ["train.py has no option --no_such"],
        ),
        ("python train.py no.yaml", ["there is no file no.yaml"]),
        ("CUDA_VISIBLE_DEVICES=0 python no.py", ["there is no script no.py"]),
        ("python -m mimic_el.nothing", ["there is no module mimic_el.nothing"]),
        ("make nothing", ["make has no target nothing"]),
        ("mimic-el nothing", ["mimic-el has no subcommand nothing"]),
        ("mimic-el index nothing", ["mimic-el index has no subcommand nothing"]),
        ("mimic-el train configs/sample.yaml --seed 1 --no_such", ["mimic-el train has no option --no_such"]),
        ("mimic-el index build --output_dir x --top_k 1", ["mimic-el index has no option --top_k"]),
        ("make test compat\npip install mimic-el --pre\ngit clone x", []),
        (
            "python scripts/push_to_hub.py --namespace alice --no-set_default_index --dryrun",
            ["scripts/push_to_hub.py has no option --dryrun"],
        ),
    ],
)
def test_problems_of_commands(command: str, problems: list[str]):
    assert problems_of_commands(command) == problems


TABLE = """
<!-- test: all options of MimicModel.score -->

| argument | |
| --- | --- |
| `mentions`, `no_such` | `a` |

| another | |
| --- | --- |
| `b` | |
"""


def test_problems_of_a_table():
    (table,) = option_tables(TABLE)
    assert (table.owner, table.names, table.complete, table.line) == (
        "MimicModel.score",
        ["mentions", "no_such"],
        True,
        2,
    )
    problems = problems_of_table(table)
    assert "MimicModel.score has no option no_such" in problems
    assert "the table does not name entities, an option of MimicModel.score" in problems
    with pytest.raises(PageError, match="no table after"):
        option_tables("<!-- test: options of push -->\n\nText.\n")


def test_every_target_of_make_is_listed():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    described = set(re.findall(r"^([a-z]+):.*## \S", text, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert described == phony - {"package"}


def test_ci_runs_targets_of_make_alone():
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"\brun: *(.*)", text) == ["make ${{ matrix.target }}"]
    matrix = re.search(r"target: \[(.*)\]", text)[1].replace(",", "")  # type: ignore[index]
    hook = re.search(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))[1]  # type: ignore[index]
    assert not problems_of_commands(f"make {matrix}\n{hook}")
