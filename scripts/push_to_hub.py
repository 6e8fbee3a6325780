"""Publishes a checkpoint, its index of entities and data sets on the Hub, in one go.

    mimic-el push --namespace alice --model_dir runs/wikimel --index_dir runs/wikimel/index \\
        --dataset_dir data/wikimel --dry_run

With --dry_run nothing is sent: every file that would be is listed, with its size; without a network too. Without it the
same files are uploaded, each repository in one commit. The command can be repeated, after an interruption too: what is
up already is not sent again. Log in first, with `hf auth login` or the variable HF_TOKEN. Files that are symbolic links
to a place outside of their folder are refused.

The published model names the published index as its default, so that `pipeline(model="alice/wikimel")` finds it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, validate_repo_id
from tqdm.auto import tqdm
from transformers.dynamic_module_utils import get_relative_import_files

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.console import given_path, harmless, parse, tolerate_any_text
from mimic_el.errors_mimic import MimicError
from mimic_el.files_mimic import regular
from mimic_el.hub_files_mimic import EVAL_RESULTS_FOLDER, REPLACED, hub_files
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.training.model_card import eval_results_yaml

# Whatever reads YAML takes minutes for what may be megabytes long.
_MOST_OF_A_CARD, _MOST_METADATA = 2**22, 2**17


class PublishError(MimicError, ValueError):
    """What was asked cannot be published, with what is wrong and what to do."""


@dataclass
class Repository:
    """What one repository is to hold.

    Args:
        kind: "model", "index" or "dataset".
        repo_id: its id.
        files: the content of each file, by its path in the repository.
        left_out: names in the directory that are not uploaded.
        notes: what the user should know.
        states: of each file: "new", "changed" or "same", or "unknown". Filled in by [`compare`].
        deleted: paths that are there and will not be. Filled in by [`compare`].
    """

    kind: str
    repo_id: str
    files: dict[str, Path | bytes]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)

    @property
    def repo_type(self) -> str:
        return "model" if self.kind == "model" else "dataset"

    @property
    def address(self) -> str:
        return self.repo_id if self.kind == "model" else f"datasets/{self.repo_id}"

    @property
    def to_send(self) -> list[str]:
        return [path for path, state in self.states.items() if state != "same"]

    def size(self, path: str) -> int:
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


# --- What is published ------------------------------------------------------------------------------------------------


def model_repository(
    directory: Path, repo_id: str, default_index: str | None, names: Mapping[str, str], datasets: Sequence[str]
) -> Repository:
    """A checkpoint's files.

    Args:
        directory: the checkpoint.
        repo_id: where it goes.
        default_index: the index that the published configuration names; `None` leaves what is there.
        names: what the card calls models and data sets here, and what they are called on the Hub.
        datasets: ids of the data sets for the card's metadata.

    Raises:
        PublishError: if it is not a checkpoint of a MimicModel, or lacks a file that loading it needs.
        HubFilesError: if a file is a symbolic link to a place outside of it.
    """
    try:
        text = (directory / "config.json").read_text(encoding="utf-8")
        config = json.loads(text)
        model_type, auto_map = config["model_type"], config.get("auto_map") or {}
        auto_map = {str(name): str(reference) for name, reference in auto_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PublishError(f"{directory} is not a checkpoint: its config.json cannot be read ({error}).") from error
    if model_type != MimicConfig.model_type:
        raise PublishError(f"{directory} is a model of type {model_type!r}, not {MimicConfig.model_type!r}.")
    files, left_out = hub_files(directory, "model")
    repository = Repository("model", repo_id, dict(files), left_out)
    _check_checkpoint(directory, auto_map, config.get("custom_pipelines"), repository.files)
    if default_index is not None:
        config["default_index"], config["default_index_revision"] = default_index, None
    elif (named := config.get("default_index")) and (directory / str(named)).is_dir():
        config["default_index"] = None
        repository.notes.append(
            f"its default index is the folder {named!r} here, which is not published; --index_dir publishes it"
        )
    if config != json.loads(text):
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        repository.files["config.json"] = text.encode()
    # What Inference Endpoints run; it needs an index, which the configuration names.
    if config.get("default_index"):
        repository.files["handler.py"] = Path(__file__).parent / "endpoint_handler.py"
    if "README.md" in repository.files:
        repository.files |= _published_results(directory, repository.files, names, datasets)
        repository.files["README.md"] = _published_card(directory / "README.md", names, datasets).encode()
    else:
        repository.notes.append("it has no README.md, so its page will be empty; `mimic-el train` writes one")
    return repository


def _check_checkpoint(
    directory: Path, auto_map: Mapping[str, str], pipelines: Any, files: Mapping[str, Path | bytes]
) -> None:
    lacking = [name for name in ("AutoConfig", "AutoModel") if name not in auto_map]
    if lacking:
        raise PublishError(
            f"{directory / 'config.json'} does not say where its code is ({', '.join(lacking)} in `auto_map`). Save "
            "the model again, with model.save_pretrained."
        )
    references = set(auto_map.values())
    if isinstance(pipelines, dict):
        references |= {
            str(entry["impl"]) for entry in pipelines.values() if isinstance(entry, dict) and "impl" in entry
        }
    for reference in sorted(references):
        file = f"{reference.rpartition('--')[2].partition('.')[0]}.py"
        try:
            needed = {file, *(Path(path).name for path in get_relative_import_files(directory / file))}
        except OSError as error:
            raise PublishError(
                f"{directory} lacks code that its configuration names ({error}). Save the model again, with "
                "model.save_pretrained."
            ) from error
        if absent := sorted(needed - set(files)):
            raise PublishError(f"{directory} lacks {', '.join(absent)}. Save the model again, with save_pretrained.")
    for what, patterns in (("weights", "*.safetensors"), ("processor", "processor_config.json")):
        if not any(fnmatchcase(name, patterns) for name in files):
            raise PublishError(f"{directory} has no {what} ({patterns}). Save model and processor there.")


def _published_card(path: Path, names: Mapping[str, str], datasets: Sequence[str]) -> str:
    """A card whose snippets and metadata say what model and data sets are called on the Hub."""
    card = _read_card(path)
    if datasets and not card.data.get("datasets"):
        card.data["datasets"] = list(datasets)
    text = str(card)
    for here, there in names.items():
        text = re.sub(rf'((?:model=|load_dataset\()"){re.escape(here)}"', rf'\g<1>{there}"', text)
    return text


def _published_results(
    directory: Path, files: Mapping[str, Path | bytes], names: Mapping[str, str], datasets: Sequence[str]
) -> dict[str, Path | bytes]:
    """The figures of the test split for the leaderboard of the data set that is published with the model.

    They are written where the card says that the model was trained on that data set, and training, which knew it as a
    directory, left its results.
    """
    known = {here: there for here, there in names.items() if there in datasets}
    card = str(_read_card(directory / "README.md"))
    trained_on = [there for here, there in known.items() if f'load_dataset("{here}"' in card]
    if len(trained_on) != 1 or any(name.startswith(EVAL_RESULTS_FOLDER) for name in files):
        return {}
    try:
        results = json.loads((directory / "test_results.json").read_text(encoding="utf-8"))
        measured = {str(name).removeprefix("test_"): value for name, value in dict(results).items()}
    except (OSError, ValueError, TypeError):
        return {}
    text = eval_results_yaml(trained_on[0], measured)
    name = f"{EVAL_RESULTS_FOLDER}/{trained_on[0].rpartition('/')[2]}.yaml"
    return {} if text is None else {name: text.encode()}


def _read_card(path: Path) -> RepoCard:
    """A README.md.

    Raises:
        PublishError: if it cannot be read, or its metadata is not valid YAML.
    """
    try:
        size = regular(path).stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _MOST_OF_A_CARD else ""
        metadata = text.partition("---\n")[2].partition("\n---")[0]
        if size > _MOST_OF_A_CARD or len(metadata) > _MOST_METADATA:
            raise PublishError(
                f"{path} is too large: a card may have {_MOST_OF_A_CARD:,} bytes, and {_MOST_METADATA:,} characters of "
                "them metadata. Make it shorter."
            )
        return RepoCard(text, ignore_metadata_errors=True)
    except PublishError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PublishError(f"{path} cannot be read: its metadata is not valid YAML, or no text ({reason})") from error


def dataset_repository(directory: Path, repo_id: str) -> Repository:
    """A data set's files: all of its directory but what is hidden.

    Raises:
        HubFilesError: if a file is a symbolic link to a place outside of the directory.
        PublishError: if its README.md does not describe the configurations of a data set for entity linking, or a
            file that it names is not there.
    """
    card = directory / "README.md"
    if not card.is_file():
        raise PublishError(f"{directory} is not a data set: it has no README.md. `mimic-el prepare` makes one.")
    listed = _read_card(card).data.to_dict().get("configs")
    configurations = {
        str(item.get("config_name")): item
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict)
    }
    if absent := {"mentions", "entities"} - set(configurations):
        raise PublishError(
            f"{card} lists no configuration {' and '.join(map(repr, sorted(absent)))}, which a data set for entity "
            "linking has. `mimic-el prepare` makes one."
        )
    files, left_out = hub_files(directory, "dataset")
    for name, item in configurations.items():
        for pattern in _patterns(item.get("data_files")):
            if not any(fnmatchcase(file, pattern) for file in files):
                raise PublishError(f"{card} names {pattern!r} for the configuration {name!r}: there is no such file.")
    return Repository("dataset", repo_id, dict(files), left_out)


def _patterns(data_files: Any) -> list[str]:
    """The files that a configuration in a card names: one, a list, or a list of splits with one or a list each."""
    if isinstance(data_files, dict):
        return _patterns(data_files.get("path"))
    if isinstance(data_files, list):
        return [pattern for entry in data_files for pattern in _patterns(entry)]
    return [] if data_files is None else [str(data_files)]


# --- The Hub ----------------------------------------------------------------------------------------------------------


def compare(api: HfApi, repository: Repository, private: bool) -> None:
    """Finds what of a repository is on the Hub already.

    Raises:
        PublishError: if it is there and public, and is to be private.
    """
    try:
        info = api.repo_info(repository.repo_id, repo_type=repository.repo_type)
    except RepositoryNotFoundError:
        repository.states = dict.fromkeys(repository.files, "new")
        return
    if private and not info.private:
        raise PublishError(
            f"{repository.address} is there already, and public: --private makes new repositories private, and changes "
            "no other. Make it private on its page, or choose another name."
        )
    listing = api.list_repo_tree(repository.repo_id, repo_type=repository.repo_type, recursive=True)
    there = {entry.path: entry for entry in listing if isinstance(entry, RepoFile)}
    for path, content in repository.files.items():
        entry = there.get(path)
        same = entry is not None and entry.size == repository.size(path) and _is(content, entry)
        repository.states[path] = "same" if same else "changed" if entry else "new"
    repository.deleted = [
        path
        for path in there
        if path not in repository.files and any(fnmatchcase(path, pattern) for pattern in REPLACED[repository.kind])
    ]


def _is(content: Path | bytes, entry: RepoFile) -> bool:
    """Whether a file on the Hub, of the same size, has that content."""
    if entry.lfs is not None:
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest() == entry.lfs.sha256
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id


def check_card(api: HfApi, repository: Repository) -> None:
    """Has the Hub check the metadata of a README.md.

    Raises:
        PublishError: if the Hub would refuse it.
    """
    content = repository.files.get("README.md")
    if content is None:
        return
    text = content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")
    # RepoCard.validate of huggingface_hub before 2 asks huggingface.co, whatever Hub is published to.
    body = {"repoType": repository.repo_type, "content": text}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        raise PublishError(f"The README.md of {repository.address} is not valid: {response.text}")
    response.raise_for_status()


def upload(api: HfApi, repository: Repository, private: bool) -> None:
    """Creates the repository if there is none, and commits what is new."""
    api.create_repo(repository.repo_id, repo_type=repository.repo_type, private=private, exist_ok=True)
    if not repository.to_send and not repository.deleted:
        return
    api.create_commit(
        repository.repo_id,
        [
            *(CommitOperationAdd(path, repository.files[path]) for path in repository.to_send),
            *(CommitOperationDelete(path) for path in repository.deleted),
        ],
        commit_message=f"Upload {'data set' if repository.kind == 'dataset' else repository.kind}",
        repo_type=repository.repo_type,
    )


# --- Command line -----------------------------------------------------------------------------------------------------


def describe(repository: Repository, private: bool) -> str:
    """The lines of a listing."""
    kind = {"model": "model", "index": "entity index", "dataset": "data set"}[repository.kind]
    known = "unknown" not in repository.states.values()
    lines = [f"{repository.address} ({kind}{', private if new' if private else ''})"]
    width = max(map(len, repository.files), default=0)
    for path, state in repository.states.items():
        lines.append(f"  {state:8} {path:{width}}  {_size(repository.size(path)):>10}")
    lines += [f"  {'delete':8} {path}" for path in repository.deleted]
    total = sum(repository.size(path) for path in repository.to_send)
    up = len(repository.files) - len(repository.to_send)
    lines.append(
        f"  {len(repository.to_send)} files to upload, {_size(total)}{f'; {up} are up already' if known else ''}"
    )
    if repository.left_out:
        lines.append(f"  left out: {', '.join(repository.left_out)}")
    lines += [f"  note: {note}" for note in repository.notes]
    return "\n".join(lines)


def snippet(model: str | None, index: str | None, default: bool, datasets: Sequence[str]) -> str:
    """The Python that uses what was published."""
    if model is None:
        lines = ["from datasets import load_dataset", ""] if datasets else []
        lines += [f'mentions = load_dataset("{dataset}", "mentions")' for dataset in datasets]
        if index is not None:
            lines += ["from mimic_el import EntityIndex", "", f'index = EntityIndex.from_pretrained("{index}")']
        return "\n".join(lines)
    lines, given = ["from transformers import pipeline", ""], ""
    if index is None:
        given = ", entities=entities"
        if datasets:
            lines = ["from datasets import load_dataset", *lines]
            lines.append(f'entities = load_dataset("{datasets[0]}", "entities", split="kb")')
        else:
            lines.append(
                'entities = [{"id": "brand:orange", "name": "Orange", "description": "Telecommunications company"}]'
            )
    elif not default:
        given = f', index="{index}"'
    lines.append(f'linker = pipeline("multimodal-entity-linking", model="{model}", trust_remote_code=True{given})')
    lines.append('linker({"mention": "Orange", "text": "Orange opened a shop on the corner.", "image": "photo.png"})')
    return "\n".join(lines)


def _size(size: float) -> str:
    if size < 1000:
        return f"{size:.0f} B"  # which tqdm would give two decimals
    return re.sub(r"(?<=\d)(?=[kMGT])", " ", tqdm.format_sizeof(size, "B"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimic-el push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--namespace", required=True, help="your user name on the Hub, or an organization's")
    parser.add_argument(
        "--model_dir", type=given_path, help="a checkpoint, such as the output directory of `mimic-el train`"
    )
    parser.add_argument("--model_name", help="its name on the Hub (default: the directory's)")
    parser.add_argument("--index_dir", type=given_path, help="an EntityIndex that the checkpoint made")
    parser.add_argument(
        "--index_name", help="its name on the Hub (default: the model's and -index, or the directory's)"
    )
    parser.add_argument(
        "--dataset_dir", type=given_path, nargs="+", default=[], help="data sets, as `mimic-el prepare` writes them"
    )
    parser.add_argument("--dataset_names", nargs="+", help="their names on the Hub (default: the directories')")
    parser.add_argument(
        "--set_default_index",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the published model names the published index as its default (default: it does)",
    )
    parser.add_argument("--license", help="license of the index's entities (default: that of a single data set)")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--dry_run", action="store_true", help="list what would be uploaded, and send nothing")
    return parser


def plan(args: argparse.Namespace, stack: ExitStack) -> list[Repository]:
    """What is published, data sets first, then the index, then the model that names both; checked as far as can be.

    Raises:
        MimicError: if something is not there, does not fit together, or leads out of its folder.
    """
    for directory in [args.model_dir, args.index_dir, *args.dataset_dir]:
        if directory is not None and not directory.is_dir():
            raise PublishError(f"There is no directory {directory}.")
    names = args.dataset_names or [directory.resolve().name for directory in args.dataset_dir]
    if len(names) != len(args.dataset_dir):
        raise PublishError(f"There are {len(args.dataset_dir)} data sets, but {len(names)} --dataset_names.")
    dataset_ids = [f"{args.namespace}/{name}" for name in names]
    model_id = index_id = None
    if args.model_dir is not None:
        model_id = f"{args.namespace}/{args.model_name or args.model_dir.resolve().name}"
    if args.index_dir is not None:
        name = args.index_name or (
            f"{model_id.rpartition('/')[2]}-index" if model_id else args.index_dir.resolve().name
        )
        index_id = f"{args.namespace}/{name}"
    wanted = [*dataset_ids, *([index_id] if index_id else [])]
    for repo_id in [*wanted, *([model_id] if model_id else [])]:
        validate_repo_id(repo_id)
    if len(set(wanted)) < len(wanted):
        raise PublishError(f"Data sets and index need names of their own, got {', '.join(wanted)}.")

    repositories = [
        dataset_repository(directory, repo_id) for directory, repo_id in zip(args.dataset_dir, dataset_ids, strict=True)
    ]
    model = None
    if args.model_dir is not None and model_id is not None:
        known = dict(zip([directory.resolve().name for directory in args.dataset_dir], dataset_ids, strict=True))
        known[args.model_dir.resolve().name] = model_id
        default_index = index_id if args.set_default_index else None
        model = model_repository(args.model_dir, model_id, default_index, known, dataset_ids)
    if index_id is not None:
        index = EntityIndex.from_pretrained(args.index_dir)
        if model is not None:
            index.check_model(_loaded(args.model_dir))
        source = dataset_ids[0] if len(dataset_ids) == 1 else None
        license = args.license
        if license is None and source:
            license = _read_card(args.dataset_dir[0] / "README.md").data.to_dict().get("license")
        about = {"model_id": model_id, "license": license if isinstance(license, str) else None, "source": source}
        files = stack.enter_context(index.files_for_hub(index_id, **about))
        repositories.append(Repository("index", index_id, files))
    return repositories if model is None else [*repositories, model]


def _loaded(directory: Path) -> MimicModel:
    try:
        return MimicModel.from_pretrained(directory, dtype=torch.float32)
    except Exception as error:  # a damaged configuration fails in many ways
        reason = str(error) or type(error).__name__
        raise PublishError(f"The model in {directory} cannot be loaded: {reason}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 where something is wrong, or 130 where it was interrupted."""
    tolerate_any_text()
    parser = _parser()
    args = parse(parser, argv)
    if not (args.model_dir or args.index_dir or args.dataset_dir):
        parser.error("give --model_dir, --index_dir or --dataset_dir")
    api = HfApi()
    try:
        with ExitStack() as stack:
            repositories = plan(args, stack)
            for repository in repositories:
                try:
                    compare(api, repository, args.private)
                    check_card(api, repository)
                except (HTTPError, OSError) as error:
                    if not args.dry_run:
                        raise
                    repository.states = dict.fromkeys(repository.files, "unknown")
                    repository.notes.append(
                        f"{api.endpoint} refuses, or cannot be reached ({_first_line(error)}): what is up already is "
                        "not known, and the card was not checked"
                    )
            print("\n\n".join(describe(repository, args.private) for repository in repositories))
            if args.dry_run:
                print("\nNothing was sent: this is a dry run.")
                return 0
            for repository in repositories:
                upload(api, repository, args.private)
                print(f"\n{api.endpoint}/{repository.address} is up.")
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: what is up is not sent again.", file=sys.stderr)
        return 130
    except (MimicError, HFValidationError) as error:
        print(f"error: {harmless(str(error))}", file=sys.stderr)
        return 1
    except (HTTPError, OSError, RuntimeError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        print(
            f"error: {api.endpoint} refuses, or cannot be reached: {error}{cause}\nLog in with `hf auth login` if you "
            "have not. Run the same command again to go on: what is up is not sent again.",
            file=sys.stderr,
        )
        return 1
    published = {kind: [r.repo_id for r in repositories if r.kind == kind] for kind in REPLACED}
    model, index = (next(iter(published[kind]), None) for kind in ("model", "index"))
    print(f"\n{snippet(model, index, args.set_default_index, published['dataset'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
