"""Converts a checkpoint of the published MIMIC code to a directory that transformers loads, and back.

    mimic-el convert --checkpoint mimic.ckpt --clip openai/clip-vit-base-patch32 --output_dir mimic-wikimel
    mimic-el convert --to_original --checkpoint mimic-wikimel --output_dir original

The first reads a Lightning `.ckpt`, or a state dict as `.pt` or `.safetensors`. It writes a directory for
`AutoModel.from_pretrained(..., trust_remote_code=True)`, with the processor if the CLIP source has a tokenizer. The
second writes `mimic.ckpt`, whose `state_dict` has the published names.

Nothing in a checkpoint is executed: its pickle is not run, hyper-parameters are ignored, and a file that asks for
anything but weights and hyper-parameters is refused. So are damaged weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, PreTrainedConfig
from transformers.utils import cached_file

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.console import given_path, parse, tolerate_any_text
from mimic_el.errors_mimic import MimicError
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor
from mimic_el.scripts.torch_file import Pairs, RefusedGlobalError, TorchFile, TorchFileError

# In published checkpoints, but never used by the published code.
_UNUSED = "matcher.cmfu.context_layer_norm"
_POSITION_IDS = ".position_ids"
# The sizes of the units, as the published configuration calls them: their names here, and a weight whose first
# dimension each is.
_SIZES = {
    "dv": ("image_hidden_size", "encoder.image_cls_fc.weight"),
    "TGLU_hidden_dim": ("tglu_hidden_size", "matcher.tglu.fc_query.weight"),
    "IDLU_hidden_dim": ("vdlu_hidden_size", "matcher.vdlu.dual_ent2men.cls_fc.weight"),
    "CMFU_hidden_dim": ("cmfu_hidden_size", "matcher.cmfu.text_fc.weight"),
}
_TEXT_MAX_LENGTH = 40
# How much larger than the file the weights may be that share storages.
_MAX_SHARED = 4
_SMALL_BYTES = 1 << 20
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# Of Lightning 1.7, with which the published code runs; its loader wants to see one.
_LIGHTNING_VERSION = "1.7.7"

# What a training run's hyper-parameters and counters may consist of. None of it is needed or loaded. The names of
# classes only: no function of these packages is on the list.
_HYPER_PARAMETERS = re.compile(
    r"(omegaconf|argparse|(pytorch_)?lightning|lightning_(fabric|utilities)|torchmetrics)(\.[a-z_]\w*)*\._?[A-Z]\w*"
    r"|pathlib\.\w*Path"
    r"|typing\.[A-Z]\w*"
    r"|collections\.(defaultdict|deque)"
    r"|datetime\.(date|datetime|time|timedelta|timezone)"
    r"|decimal\.Decimal"
    r"|builtins\.(bool|bytes|dict|float|frozenset|int|list|long|object|range|slice|str|tuple|unicode)"
    r"|numpy(\._?core)?\.(multiarray\.(scalar|_reconstruct)|dtype|ndarray)"
)
# What tensors are made of.
_TENSORS = re.compile(
    r"torch\.(cuda\.[A-Z]\w*Storage|[A-Z]\w*|[a-z]+\d\w*|bool|device|_utils\._rebuild_\w+|_tensor\._rebuild_\w+|nn\.parameter\.[A-Z]\w*"
    r"|storage\.[A-Z]\w*|serialization\._get_layout)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|complex|set)"
)


class ConversionError(MimicError, ValueError):
    """A checkpoint that cannot be converted, with what is wrong with it."""


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
    try:
        with TorchFile(path, _is_harmless) as file:
            content = file.content
            if isinstance(content, Pairs) and "state_dict" in (named := content.named()):
                content = named["state_dict"]
            entries = list(content) if isinstance(content, Pairs) else []
            if not entries:
                kind = "an empty dict" if isinstance(content, Pairs) else f"a {type(content).__name__}"
                raise ConversionError(
                    f"{path} holds neither a Lightning checkpoint (with a `state_dict`) nor a state dict, but {kind}."
                )
            weights: dict[str, Tensor] = {}
            size = path.stat().st_size
            total = 0
            for name, value in entries:
                weights[name] = _tensor(file, name, value)
                total += weights[name].nbytes
                # Weights may share what is stored, but a model has a copy of each.
                if total > _MAX_SHARED * size + _SMALL_BYTES:
                    raise ConversionError(
                        f"{path} is refused: its weights share what is stored, and would take more than "
                        f"{_MAX_SHARED} times the file's {size:,} bytes."
                    )
            return weights
    except RefusedGlobalError as error:
        raise ConversionError(
            f"{path} is refused: its pickle asks for `{error.args[1]}`, which weights and hyper-parameters do not "
            "need. Nothing of it was executed. If you trust where the file comes from, load it there and save its "
            "`state_dict` alone, best as safetensors."
        ) from error
    except TorchFileError as error:
        raise ConversionError(str(error)) from error


def _is_harmless(name: str) -> bool:
    return bool(_HYPER_PARAMETERS.fullmatch(name) or _TENSORS.fullmatch(name))


def _tensor(file: TorchFile, name: Any, value: Any) -> Tensor:
    try:
        tensor = file.tensor(value) if type(name) is str else None
    except TorchFileError as error:
        # A sentence of its own, or the end of this one.
        told = str(error).startswith(str(file.path))
        raise ConversionError(str(error) if told else f"{file.path}: {_shown(name)} is a tensor {error}.") from error
    if tensor is None:
        kind = "dict" if isinstance(value, Pairs) else type(value).__name__
        raise ConversionError(
            f"{file.path}: the state dict's entry {_shown(name)} is not a tensor but a {kind}. Is it the state dict of "
            "a model?"
        )
    return tensor


def _shown(name: Any) -> str:
    return repr(name[:200]) if type(name) is str else f"(a {type(name).__name__})"


def read_clip_config(source: str) -> CLIPConfig:
    """The CLIP configuration at a Hub id, in a directory or in a JSON file.

    Raises:
        ConversionError: if there is none.
    """
    path = Path(source)
    values: Any
    if not path.is_file():
        if path.suffix == ".json":
            raise ConversionError(f"There is no CLIP configuration {source}.")
        try:
            values, _ = PreTrainedConfig.get_config_dict(source)
            if "model_type" not in values:
                raise ValueError("it has no config.json that names a model's type")
        except (OSError, ValueError, RecursionError) as error:
            raise ConversionError(f"There is no CLIP configuration at {source!r}: {error}") from error
    else:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConversionError(f"The CLIP configuration {source} is not JSON: {error}") from error
        if isinstance(values, dict):
            values = values.get("clip_config", values)
        if not isinstance(values, dict) or not {"text_config", "vision_config"} <= set(values):
            raise ConversionError(f"{source} is not a CLIP configuration: it has no `text_config` and `vision_config`.")
    if values.get("model_type", "clip") != "clip":
        raise ConversionError(
            f"{source} is the configuration of a model of type {values['model_type']!r}, not of CLIP."
        )
    try:
        return CLIPConfig.from_dict(values)
    except Exception as error:  # transformers checks some values, and stumbles over others
        raise ConversionError(f"{source} is not a valid CLIP configuration: {error}") from error


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
        **sizes: `dv`, `TGLU_hidden_dim`, `IDLU_hidden_dim`, `CMFU_hidden_dim`; read from the weights if absent.

    Returns:
        [`MimicModel`] in float32.

    Raises:
        ConversionError: if weights are missing, unknown, of another shape, not floating or not finite, or a size is
            not that of the weights.
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
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConversionError(f"The CLIP configuration does not do: {error}") from error

    kept = {name: tensor for name, tensor in weights.items() if not _is_unused(name, tensor)}
    expected = _expected(config, len(kept))
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
    for name, tensor in kept.items():
        if not tensor.is_floating_point():
            raise ConversionError(f"The checkpoint's {name} holds {tensor.dtype}, not floating-point numbers.")
        if not tensor.isfinite().all():
            raise ConversionError(
                f"The checkpoint's {name} has values that are not finite: the file is damaged, or the training failed."
            )
    model = MimicModel(config)
    model.load_state_dict(kept)
    return model.eval()


def _expected(config: MimicConfig, count: int) -> dict[str, Tensor]:
    """The names and shapes of a model's weights; a configuration of any size takes no memory."""
    backbone: Any = config.backbone_config
    try:
        if backbone.text_config.num_hidden_layers + backbone.vision_config.num_hidden_layers > count:
            raise ConversionError(
                f"The checkpoint does not fit the CLIP configuration: that has more layers than the {count} weights "
                "there are."
            )
        with torch.device("meta"):
            return MimicModel(config).state_dict()
    except ConversionError:
        raise
    except Exception as error:  # of the many values that no model can be made of
        raise ConversionError(f"No model can be made of this CLIP configuration: {error}") from error


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
    if not any(found):
        return None
    try:
        return MimicProcessor.from_backbone(clip, config, correct_images=False)
    except Exception as error:  # a damaged tokenizer fails in many ways
        raise ConversionError(f"The tokenizer or image processor in {clip} cannot be loaded: {error}") from error


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
        values, _ = PreTrainedConfig.get_config_dict(source)
        if values.get("model_type") != MimicConfig.model_type:
            raise ValueError(f"its model type is {values.get('model_type')!r}")
        loaded = MimicModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers checks some values of a configuration, and stumbles over others
        reason = str(error) or type(error).__name__
        raise ConversionError(f"{source} is not a checkpoint of a MimicModel: {reason}") from error
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 with a message where the conversion is refused."""
    parser = argparse.ArgumentParser(
        prog="mimic-el convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="the published file (with --to_original: a directory or Hub id)"
    )
    parser.add_argument("--clip", help="CLIP configuration: a Hub id, a directory, or a JSON file")
    parser.add_argument(
        "--output_dir", type=given_path, required=True, help="where to write; must not exist or be empty"
    )
    for name in _SIZES:
        parser.add_argument(f"--{name}", type=int, help="read from the weights if not given")
    parser.add_argument("--text_max_length", type=int, help="tokens of a text (default: 40, at most CLIP's positions)")
    parser.add_argument("--to_original", action="store_true", help="write the published format instead of reading it")
    parser.add_argument(
        "--position_ids",
        action="store_true",
        help="with --to_original: write the position_ids buffers that transformers before 4.31 expects",
    )
    tolerate_any_text()
    arguments = parse(parser, argv)
    try:
        if arguments.to_original:
            _convert_back(arguments)
        else:
            _convert(arguments)
    except (MimicError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
