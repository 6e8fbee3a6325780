"""Encodes many entities: in the fastest precision of the machine, compiled if asked, and equal images only once.

The precision in which features are computed need not be that of training: features are stored in 16 or 8 bits anyway.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from .errors_mimic import EntityIndexError
from .features_mimic import full_precision
from .matching_mimic import EntityFeatures, MimicEncoderOutput
from .modeling_mimic import MimicModel
from .texts_mimic import shortened

ENCODING_DTYPES = ("auto", "float32", "bfloat16", "float16")
# What is kept of images that may come again.
_KEPT_BYTES = 64 * 2**20
_CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def computes_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in float32: a GPU that has it, or a CPU with
    AVX512-BF16, AMX or the Arm extension."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(set(_CPU_FLAGS) & set(flags.split()))


def encoding_dtype(name: str | None, device: torch.device | str) -> torch.dtype | None:
    """The precision that a name stands for on a device; `None` for that of the model.

    Args:
        name: "auto" for bfloat16 where the device computes it, "float32", "bfloat16", "float16", or `None`.

    Raises:
        ValueError: if the name is another, or "float16" on a CPU.
    """
    if name is None:
        return None
    if name not in ENCODING_DTYPES:
        raise ValueError(f"`encoding_dtype` must be one of {', '.join(ENCODING_DTYPES)} or None, got {name!r}.")
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else None
    if name == "float16" and on_cpu:
        raise ValueError('`encoding_dtype` "float16" is for GPUs; a CPU that has it computes in "bfloat16".')
    if name == "bfloat16" and not computes_bfloat16(device):
        warnings.warn(
            'This device does not compute in bfloat16 itself: encoding in it is slower than in float32. Use "auto", or '
            "leave `encoding_dtype` out.",
            stacklevel=3,
        )
    return getattr(torch, name)


def in_precision(model: MimicModel, dtype: torch.dtype | None) -> MimicModel:
    """The model, or one that shares everything with it but an encoder in another precision."""
    if dtype is None or dtype == model.dtype:
        return model
    other = copy.copy(model)
    other._modules = dict(model._modules)
    # Converted one by one: a copy of the encoder that is converted then would be there twice for a while.
    converted: dict[int, Any] = {}
    for parameter in model.encoder.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
            converted[id(parameter)] = torch.nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    other.encoder = copy.deepcopy(model.encoder, converted).to(dtype)
    return other


def check_compiles(device: torch.device | str) -> None:
    """Makes sure that there is what `torch.compile` needs.

    Raises:
        ValueError: if there is not, with what is missing.
    """
    device = torch.device(device)
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("`compile_encoder` needs the package triton on this GPU. Install it, or leave the option out.")
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ValueError(
            "`compile_encoder` needs a C++ compiler on a CPU, and none is found. Install g++ or clang++, name another "
            "in the variable CXX, or leave the option out."
        ) from error


class _CompiledAdapter:
    """A backbone's adapter, with both towers of one model compiled. Anything else is the adapter's own."""

    def __init__(self, adapter: Any, backbone: torch.nn.Module) -> None:
        self._adapter = adapter

        def texts(input_ids: Tensor, mask: Tensor, pooling: str | None) -> tuple[Tensor, Tensor]:
            pooled, output = adapter.encode_texts(backbone, input_ids, mask, pooling, return_dict=True)
            return pooled, output.last_hidden_state

        def images(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
            pooled, output = adapter.encode_images(backbone, pixel_values, return_dict=True)
            return pooled, output.last_hidden_state

        self._on_cpu = next(backbone.parameters()).device.type == "cpu"
        # Batches are of any number, and texts of any length where their padding is left out.
        self._texts, self._images = (torch.compile(tower, dynamic=True) for tower in (texts, images))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def encode_texts(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, pooling: str | None = None, **_: Any
    ) -> tuple[Tensor, Any]:
        return self._run(self._texts, input_ids, attention_mask, pooling)

    def encode_images(self, model: Any, pixel_values: Tensor, **_: Any) -> tuple[Tensor, Any]:
        return self._run(self._images, pixel_values)

    def _run(self, tower: Any, *inputs: Any) -> tuple[Tensor, Any]:
        from torch._inductor import config

        try:
            # Weights become constants, laid out as oneDNN wants them: on a CPU that is most of the gain.
            with config.patch(freezing=self._on_cpu):
                pooled, tokens = tower(*inputs)
        except Exception as error:
            raise EntityIndexError(
                f"The compiled encoder does not run: {shortened(str(error), 200)}. Leave `compile_encoder` out."
            ) from error
        return pooled, BaseModelOutput(last_hidden_state=tokens)


def compiled(model: MimicModel, own: bool = False) -> MimicModel:
    """A model that shares the matcher with this one, and has a copy of its encoder with compiled towers, for encoding
    in the mode of evaluation. It is compiled when it is first called; weights that change later do not count.

    Args:
        own: whether the encoder is nobody else's, and need not be copied.
    """
    other = copy.copy(model)
    other._modules = dict(model._modules)
    # A copy: what was compiled before is known by its module, whose weights may have changed since.
    encoder: Any = model.encoder if own else copy.deepcopy(model.encoder)
    encoder.adapter = _CompiledAdapter(encoder.adapter, encoder.backbone)
    other.encoder = encoder
    return other


def image_digest(pixels: Tensor) -> bytes:
    """What tells equal images apart from others, of one that is prepared for the model."""
    return hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()


class EntityEncoder:
    """Encodes batches of entities. An image that comes again is not encoded again, as long as it is remembered.

    Args:
        model: in the mode of evaluation.
        dtype: a name of `ENCODING_DTYPES`, or `None` for the model's own precision.
        compile_encoder: whether its two towers are compiled, when they are first called.
    """

    def __init__(self, model: MimicModel, dtype: str | None = None, compile_encoder: bool = False) -> None:
        chosen = encoding_dtype(dtype, model.device)
        self._model = in_precision(model, chosen)
        if compile_encoder:
            self._model = compiled(self._model, own=self._model is not model)
        self._pixel_dtype = chosen or torch.float32
        self._kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0

    def __call__(self, inputs: dict[str, Tensor], digests: Sequence[bytes]) -> EntityFeatures:
        """Features of a batch.

        Args:
            inputs: as the processor makes them.
            digests: [`image_digest`] of each image.
        """
        inputs = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
        encoder: Any = self._model.encoder
        # Its precision is `dtype`'s alone: an index is the same under autocast as without.
        with torch.inference_mode(), full_precision(self._model.device):
            text_embeds, text_tokens = encoder.encode_texts(
                inputs["input_ids"], inputs["attention_mask"], return_dict=True
            )[:2]
            pixels = inputs["pixel_values"].to(self._pixel_dtype)  # which not every family does itself
            image_embeds, image_tokens = self._images(pixels, digests)
            encoded = MimicEncoderOutput(
                text_embeds=text_embeds, text_tokens=text_tokens, image_embeds=image_embeds, image_tokens=image_tokens
            )
            return self._model.matcher.entity_features(encoded, inputs["attention_mask"])

    def _images(self, pixel_values: Tensor, digests: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        first = {digest: row for row, digest in reversed(list(enumerate(digests)))}
        new = [digest for digest in first if digest not in self._kept]
        found = {digest: self._kept[digest] for digest in first if digest in self._kept}
        if new:
            rows = torch.tensor([first[digest] for digest in new], device=pixel_values.device)
            chosen = pixel_values if len(new) == len(digests) else pixel_values[rows.sort().values]
            encoder: Any = self._model.encoder
            parts = encoder.encode_images(chosen, return_dict=True)[:2]
            if len(new) == len(digests):
                for row, digest in enumerate(digests):
                    self._keep(digest, parts[0][row], parts[1][row])
                return parts
            for row, digest in enumerate(sorted(new, key=first.__getitem__)):
                found[digest] = (parts[0][row], parts[1][row])
                self._keep(digest, *found[digest])
        for digest in found:
            if digest in self._kept:
                self._kept.move_to_end(digest)
        embeds, tokens = zip(*(found[digest] for digest in digests), strict=True)
        return torch.stack(embeds), torch.stack(tokens)

    def _keep(self, digest: bytes, embed: Tensor, tokens: Tensor) -> None:
        # Copies: a row of a batch would keep the whole batch.
        self._kept[digest] = (embed.clone(), tokens.clone())
        self._bytes += embed.nbytes + tokens.nbytes
        while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= sum(tensor.nbytes for tensor in gone)


__all__ = [
    "ENCODING_DTYPES",
    "EntityEncoder",
    "check_compiles",
    "compiled",
    "computes_bfloat16",
    "encoding_dtype",
    "image_digest",
    "in_precision",
]
