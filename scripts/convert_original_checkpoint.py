"""Converts a checkpoint of the published MIMIC code to a directory that transformers loads, and back.

    python scripts/convert_original_checkpoint.py --checkpoint mimic.ckpt --clip openai/clip-vit-base-patch32 \\
        --output_dir mimic-wikimel
    python scripts/convert_original_checkpoint.py --to_original --checkpoint mimic-wikimel --output_dir original

The first reads a Lightning `.ckpt`, or a state dict as `.pt` or `.safetensors`, and writes what
`AutoModel.from_pretrained(..., trust_remote_code=True)` loads, with the processor where the CLIP source has a
tokenizer. The second writes `mimic.ckpt`, whose `state_dict` has the published names.

Nothing in a checkpoint is executed: its pickle is read by `torch.load(weights_only=True)`, hyper-parameters that come
as objects are replaced by inert stand-ins, and a file that asks for anything else is refused.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import io
import json
import os
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig
from transformers.utils import cached_file

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor

# In published checkpoints, but never used by the published code.
_UNUSED = "matcher.cmfu.context_layer_norm"
_POSITION_IDS = ".position_ids"
# Where each size of the units shows: the name of a weight, whose first dimension it is.
_SIZES = {
    "dv": ("image_hidden_size", "encoder.image_cls_fc.weight"),
    "tglu_hidden_dim": ("tglu_hidden_size", "matcher.tglu.fc_query.weight"),
    "vdlu_hidden_dim": ("vdlu_hidden_size", "matcher.vdlu.dual_ent2men.cls_fc.weight"),
    "cmfu_hidden_dim": ("cmfu_hidden_size", "matcher.cmfu.text_fc.weight"),
}
_TEXT_MAX_LENGTH = 40
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# Of Lightning 1.7, with which the published code runs; its loader wants to see one.
_LIGHTNING_VERSION = "1.7.7"

# What a training run's hyper-parameters and counters may consist of. It is not needed, so none of it is loaded: an
# inert object takes its place. The names of classes only: no function of these packages is on the list.
_IGNORED = re.compile(
    r"(omegaconf|argparse|(pytorch_)?lightning|lightning_(fabric|utilities)|torchmetrics)(\.[a-z_]\w*)*\._?[A-Z]\w*"
    r"|pathlib\.\w*Path"
    r"|typing\.[A-Z]\w*"
    r"|collections\.(defaultdict|deque)"
    r"|datetime\.(date|datetime|time|timedelta|timezone)"
    r"|decimal\.Decimal"
    r"|builtins\.(bool|bytes|dict|float|frozenset|int|list|long|object|range|slice|str|tuple|unicode)"
    r"|numpy(\._?core)?\.(multiarray\.(scalar|_reconstruct)|dtype|ndarray)"
)
# What tensors are made of; torch itself has the last word.
_LEFT_TO_TORCH = re.compile(
    r"torch\.([A-Z]\w*|[a-z]+\d\w*|bool|device|_utils\._rebuild_\w+|_tensor\._rebuild_\w+|nn\.parameter\.[A-Z]\w*"
    r"|storage\.[A-Z]\w*|serialization\._get_layout)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|complex|set)"
)
_DICTS = re.compile(r"collections\.defaultdict|.*\.AttributeDict")


_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of storages


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, with what is wrong with it."""


class _Inert:
    """Stands for an object of a checkpoint that is not needed: takes whatever it is given and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict:
    """Stands for the class of a dictionary; its instances are plain ones, the only kind that torch fills."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a checkpoint in the published format, under the published names.

    Args:
        path: a Lightning checkpoint, or a state dict saved by `torch.save` or safetensors.

    Returns:
        `dict` of names to CPU tensors. Everything else in the file is left unread.

    Raises:
        ConversionError: if there is no such file, it is broken or of another kind, or its pickle asks for anything
            but tensors and plain hyper-parameters. Nothing of the pickle is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"There is no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{path} is not a readable safetensors file: {error}") from error
    content = _load_pickle(path)
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ConversionError(
            f"{path} holds neither a Lightning checkpoint (with a `state_dict`) nor a state dict, but "
            f"{'an empty ' if isinstance(content, dict) else 'a '}{type(content).__name__}."
        )
    return {name: _checked_tensor(path, name, value) for name, value in dict.items(content)}


def _load_pickle(path: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(path)
        names = _globals_in_zip(path) if is_zip else _globals_in_legacy_file(path)
        ignored: list[Any] = []
        for name in sorted(names):
            if _IGNORED.fullmatch(name):
                ignored.append((_InertDict if _DICTS.fullmatch(name) else _Inert, name))
            elif not _LEFT_TO_TORCH.fullmatch(name):
                raise _refusal(path, name)
        with torch.serialization.safe_globals(ignored):
            # Mapped to memory, so that the optimiser's state, twice the size of the weights, is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except ConversionError:
        raise
    except Exception as error:  # a broken file fails in many ways
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise _refusal(path, wanted[1]) from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConversionError(
            f"{path} cannot be read as a checkpoint: {reason} (is the file complete, and did `torch.save` write it "
            "with its default protocol?)"
        ) from error


def _globals_in_zip(path: Path) -> set[str]:
    """The globals that the pickle of a file of `torch.save` asks for.

    Raises:
        ConversionError: if the archive is larger than it seems; `torch.save` neither compresses nor shares bytes.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ConversionError(f"{path} is a compressed archive, which `torch.save` does not write.")
        total, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if total > size:
            raise ConversionError(f"{path} says that it holds {total:,} bytes, but is a file of {size:,}.")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConversionError(f"{path} is an archive, but `torch.save` did not write it: it has no data.pkl.")
        return _globals(io.BytesIO(archive.read(pickles[0])))


def _globals_in_legacy_file(path: Path) -> set[str]:
    with open(path, "rb") as file:
        return set().union(*(_globals(file) for _ in range(_LEGACY_PICKLES)))


def _globals(file: IO[bytes]) -> set[str]:
    """The globals of the next pickle in a file, which is taken apart but not run."""
    names: set[str] = set()
    memo: dict[Any, str | None] = {}
    recent: list[str | None] = []  # what the last opcodes pushed, if strings
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            # Protocol 2 has the names of Python 2, of which torch translates some.
            names.add(f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}")
            if (module, name) in _compat_pickle.NAME_MAPPING:
                names.add(".".join(_compat_pickle.NAME_MAPPING[module, name]))
        elif opcode.name == "STACK_GLOBAL":  # of later protocols than torch.save has
            names.add(".".join(str(part) for part in recent[-2:]))
        if opcode.name == "MEMOIZE" or "PUT" in opcode.name:
            memo[len(memo) if argument is None else argument] = recent[-1] if recent else None
        else:
            pushed = memo.get(argument) if "GET" in opcode.name else argument
            recent = [*recent[-1:], pushed if isinstance(pushed, str) else None]
    return names


def _refusal(path: Path, name: str) -> ConversionError:
    return ConversionError(
        f"{path} is refused: its pickle asks for `{name}`, which weights and hyper-parameters do not need. Nothing of "
        "it was executed. If you trust where the file comes from, load it there and save its `state_dict` alone, best "
        "as safetensors."
    )


def _checked_tensor(path: Path, name: Any, value: Any) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise ConversionError(
            f"{path}: the state dict's entry {name!r} is not a tensor but a {type(value).__name__}. Is it the state "
            "dict of a model?"
        )
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConversionError(f"{path}: {name} is not a plain tensor ({tensor.layout}, {tensor.dtype}).")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ConversionError(f"{path}: {name} has the shape {tuple(tensor.shape)}, more than the file stores of it.")
    return tensor


def read_clip_config(source: str) -> CLIPConfig:
    """The CLIP configuration at a Hub id, in a directory or in a JSON file.

    Raises:
        ConversionError: if there is none.
    """
    path = Path(source)
    if not path.is_file():
        if path.suffix == ".json":
            raise ConversionError(f"There is no CLIP configuration {source}.")
        try:
            config: Any = MimicConfig.from_backbone(source).backbone_config
        except (OSError, ValueError) as error:
            raise ConversionError(f"There is no CLIP configuration at {source!r}: {error}") from error
        return config
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"The CLIP configuration {source} is not JSON: {error}") from error
    if isinstance(values, dict):
        values = values.get("clip_config", values)
    if not isinstance(values, dict) or not {"text_config", "vision_config"} <= set(values):
        raise ConversionError(f"{source} is no CLIP configuration: it has no `text_config` and `vision_config`.")
    if values.get("model_type", "clip") != "clip":
        raise ConversionError(
            f"{source} is the configuration of a model of type {values['model_type']!r}, not of CLIP."
        )
    return CLIPConfig.from_dict(values)


def from_original(
    weights: Mapping[str, Tensor],
    clip_config: CLIPConfig,
    text_max_length: int | None = None,
    **sizes: int | None,
) -> MimicModel:
    """A model with the weights of a published checkpoint.

    Args:
        weights: the published state dict, as [`read_checkpoint`] gives it.
        clip_config: the CLIP model that was trained.
        text_max_length: number of tokens of a text. Defaults to the published 40, or the number of positions of a
            CLIP that has less.
        **sizes: `dv`, `tglu_hidden_dim`, `vdlu_hidden_dim`, `cmfu_hidden_dim`; read from the weights if absent.

    Returns:
        [`MimicModel`] in float32.

    Raises:
        ConversionError: if weights are missing, unknown or of another shape, or a size is not that of the weights.
    """
    settings: dict[str, Any] = {}
    for argument, (name, key) in _SIZES.items():
        if key not in weights or weights[key].dim() != 2:
            raise ConversionError(
                f"The checkpoint has no matrix `{key}`: these are not the weights of a published MIMIC model. Its "
                f"first names are {', '.join(sorted(weights)[:5])}."
            )
        found, given = weights[key].shape[0], sizes.get(argument)
        if given is not None and given != found:
            raise ConversionError(f"`{argument}` is {given}, but the checkpoint's `{key}` says {found}.")
        settings[name] = found
    if text_max_length is None:
        text: Any = clip_config.text_config
        text_max_length = min(_TEXT_MAX_LENGTH, text.max_position_embeddings)
    try:
        config = MimicConfig(backbone_config=clip_config, text_max_length=text_max_length, **settings)
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from error

    kept = {name: tensor for name, tensor in weights.items() if not _is_unused(name, tensor)}
    model = MimicModel(config)
    expected = model.state_dict()
    problems = [f"missing: {name}" for name in sorted(expected.keys() - kept.keys())]
    problems += [f"unknown: {name}" for name in sorted(kept.keys() - expected.keys())]
    problems += [
        f"of another shape: {name} is {tuple(kept[name].shape)}, {tuple(expected[name].shape)} in this configuration"
        for name in sorted(expected.keys() & kept.keys())
        if kept[name].shape != expected[name].shape
    ]
    if problems:
        raise ConversionError(
            f"The checkpoint does not fit the CLIP configuration or is not a published MIMIC model; {len(problems)} "
            f"of its weights are\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    model.load_state_dict(kept)
    return model.eval()


def _is_unused(name: str, tensor: Tensor) -> bool:
    if name.endswith(_POSITION_IDS):
        positions = torch.arange(tensor.numel()).view(tensor.shape)
        if not torch.equal(tensor.to(positions.dtype), positions):
            raise ConversionError(f"`{name}` does not number the positions from 0, as every CLIP model does.")
        return True
    return name.startswith(f"{_UNUSED}.")


def to_original(model: MimicModel, position_ids: bool = False) -> OrderedDict[str, Tensor]:
    """The state dict of a model under the published names, float32.

    Args:
        model: any [`MimicModel`].
        position_ids: whether to write CLIP's numbered positions too, which versions of transformers before 4.31 want
            to find in a state dict and later ones do not.
    """
    weights = OrderedDict((name, tensor.detach().float().cpu()) for name, tensor in model.state_dict().items())
    size = model.config.cmfu_hidden_size
    weights[f"{_UNUSED}.weight"] = torch.ones(size)
    weights[f"{_UNUSED}.bias"] = torch.zeros(size)
    if position_ids:
        for part in ("text_model", "vision_model"):
            name = f"encoder.clip.{part}.embeddings.position_embedding.weight"
            weights[f"encoder.clip.{part}.embeddings{_POSITION_IDS}"] = torch.arange(len(weights[name])).unsqueeze(0)
    return weights


def _processor(clip: str, config: Any) -> MimicProcessor | None:
    if Path(clip).is_file():
        return None
    found = [
        cached_file(clip, name, _raise_exceptions_for_missing_entries=False)  # None if the source has no such file
        for name in _TOKENIZER_FILES
    ]
    return MimicProcessor.from_backbone(clip, config, correct_images=False) if any(found) else None


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.clip is None:
        raise ConversionError("`--clip` is needed: a Hub id, a directory or a JSON file of the CLIP that was trained.")
    weights = read_checkpoint(arguments.checkpoint)
    sizes = {name: getattr(arguments, name) for name in _SIZES}
    model = from_original(weights, read_clip_config(arguments.clip), arguments.text_max_length, **sizes)
    processor = _processor(arguments.clip, model.config)
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConversionError(f"The output directory {output_dir} exists and is not empty.")
    model.save_pretrained(output_dir)
    if processor is not None:
        processor.save_pretrained(output_dir)
    left_out = sorted(weights.keys() - model.state_dict().keys())
    config = model.config
    print(
        f"Wrote {output_dir}: {len(model.state_dict())} tensors; "
        + ", ".join(f"{name}={getattr(config, setting)}" for name, (setting, _) in _SIZES.items())
        + f", text_max_length={config.text_max_length}."
    )
    if left_out:
        print(f"Left out, since no score depends on them: {', '.join(left_out)}.")
    if processor is None:
        print(f"Without a processor: {arguments.clip} has no tokenizer. Save one there with MimicProcessor.")


def _convert_back(arguments: argparse.Namespace) -> None:
    source = arguments.checkpoint
    loaded: Any
    try:
        values, _ = MimicConfig.get_config_dict(source)
        if values.get("model_type") != MimicConfig.model_type:
            raise ValueError(f"its model type is {values.get('model_type')!r}")
        loaded = MimicModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ConversionError(f"{source} is not a checkpoint of a MimicModel: {error}") from error
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise ConversionError(f"{source} lacks weights of a MimicModel: {', '.join(absent)}.")
    config = model.config
    if config.mask_text_padding:
        print(
            "Warning: this model was trained with `mask_text_padding`, which the published code does not have: its "
            "scores will differ there.",
            file=sys.stderr,
        )
    weights = to_original(model, arguments.position_ids)
    content = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": _LIGHTNING_VERSION, "state_dict": weights}
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "mimic.ckpt"
    if path.exists():
        raise ConversionError(f"The output file {path} exists.")
    partial = path.with_suffix(".partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    print(
        f"Wrote {path}: {len(weights)} tensors. The published configuration must say "
        + ", ".join(f"{name}={getattr(config, setting)}" for name, (setting, _) in _SIZES.items())
        + f" and a text length of {config.text_max_length}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exits with status 1 and a message where the conversion is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", required=True, help="the published file (with --to_original: a directory or Hub id)"
    )
    parser.add_argument("--clip", help="CLIP configuration: a Hub id, a directory, or a JSON file")
    parser.add_argument("--output_dir", required=True, help="where to write; must not exist or be empty")
    for name in _SIZES:
        parser.add_argument(f"--{name}", type=int, help="read from the weights if not given")
    parser.add_argument("--text_max_length", type=int, help="tokens of a text (default: 40, at most CLIP's positions)")
    parser.add_argument("--to_original", action="store_true", help="write the published format instead of reading it")
    parser.add_argument(
        "--position_ids",
        action="store_true",
        help="with --to_original: write the position_ids buffers that transformers before 4.31 expects",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.to_original:
            _convert_back(arguments)
        else:
            _convert(arguments)
    except ConversionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
