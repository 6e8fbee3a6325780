"""Reads the tensors of a file of `torch.save` without running its pickle.

A pickle is a program. Here its instructions are only followed, on nodes that do nothing: a call becomes a note of what
would be called, a dictionary a list of pairs, and no key is hashed. So nothing is executed, and a small file can take
neither much memory nor much time: memory grows with the number of instructions, which is limited, and tensors are read
only when they are asked for. Knows nothing of models, or of what the weights are for.
"""

from __future__ import annotations

import _compat_pickle
import io
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from mimic_el.errors_mimic import MimicError

# A checkpoint of CLIP ViT-L with its optimizer's state has 60,000 instructions in half a megabyte.
_MAX_INSTRUCTIONS = 2_000_000
_MAX_PICKLE_BYTES = 32 * 2**20
_MAX_LINE_BYTES = 2**16
_MAX_DIMENSIONS = 64
_CHUNK_BYTES = 2**20
# How a file of the format before PyTorch 1.6 begins.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")


class TorchFileError(MimicError, ValueError):
    """A file of `torch.save` that cannot be read, or is not one."""


class RefusedGlobalError(TorchFileError):
    """A pickle that asks for what it is not allowed; `args` are the file and the name."""

    def __str__(self) -> str:
        return f"{self.args[0]} is refused: its pickle asks for `{self.args[1]}`."


@dataclass(slots=True)
class Global:
    """A class or function that a pickle names."""

    name: str


@dataclass(slots=True)
class Call:
    """What a pickle would have called, and with what."""

    function: Any
    arguments: Any


@dataclass(slots=True)
class PersistentId:
    """What stands for a tensor's storage."""

    value: Any


@dataclass(slots=True)
class Pairs:
    """A dictionary: `given` is what it was made of, `items` is what was set later."""

    given: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for pair in self.given if isinstance(self.given, list | tuple) else ():
            if isinstance(pair, list | tuple) and len(pair) == 2:
                yield pair[0], pair[1]
        yield from self.items

    def named(self) -> dict[str, Any]:
        """The entries whose keys are strings."""
        return {key: value for key, value in self if type(key) is str}


class TorchFile:
    """A file of `torch.save`, in the format of today (an archive) or of before PyTorch 1.6.

    Args:
        path: the file.
        allowed: whether a class or function may be named in the pickle. It is not called in any case.

    Attributes:
        content: what was saved: plain values, lists, tuples, [`Pairs`], [`Call`]s and [`Global`]s. [`tensor`] reads
            a tensor of it.

    Raises:
        RefusedGlobalError: if the pickle names what is not allowed.
        TorchFileError: if the file is broken, damaged, or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str], allowed: Callable[[str], bool]) -> None:
        self.path = Path(path)
        self._allowed = allowed
        self._instructions = 0
        self._storages: dict[str, tuple[int, bytearray]] = {}  # the bytes of one element, and the content
        self._archive: zipfile.ZipFile | None = None
        self._prefix = ""
        self._places: dict[str, tuple[int, int]] = {}
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115
            self.content = self._open_archive() if zipfile.is_zipfile(self._file) else self._open_legacy()
        except TorchFileError:
            self.close()
            raise
        except Exception as error:  # a broken file fails in many ways
            self.close()
            raise self._broken(str(error).strip().partition("\n")[0] or type(error).__name__) from error

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _broken(self, reason: str) -> TorchFileError:
        return TorchFileError(
            f"{self.path} cannot be read as a checkpoint: {reason} (is the file complete, and did `torch.save` write "
            "it?)"
        )

    # --- The two formats

    def _open_archive(self) -> Any:
        self._archive = archive = zipfile.ZipFile(self._file)
        entries = archive.infolist()
        # `torch.save` neither compresses nor shares bytes: an archive is not larger than it seems.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TorchFileError(f"{self.path} is a compressed archive, which `torch.save` does not write.")
        total, size = sum(entry.file_size for entry in entries), self.path.stat().st_size
        if total > size:
            raise TorchFileError(f"{self.path} says that it holds {total:,} bytes, but is a file of {size:,}.")
        if len(archive.NameToInfo) != len(entries):
            raise TorchFileError(f"{self.path} is an archive that has two files of one name.")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise TorchFileError(f"{self.path} is an archive, but `torch.save` did not write it: it has no data.pkl.")
        self._prefix = pickles[0].filename.removesuffix("data.pkl")
        order = archive.NameToInfo.get(f"{self._prefix}byteorder")
        if order is not None and order.file_size <= 16 and self._record(order) != b"little":
            raise self._broken("it was written on a machine with another order of bytes")
        if pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise self._broken(f"its pickle has {pickles[0].file_size:,} bytes, more than the weights of a model need")
        data = self._record(pickles[0])
        return self._interpreted(_Limited(io.BytesIO(data), len(data)))

    def _record(self, entry: zipfile.ZipInfo) -> bytearray:
        """The bytes of a file of the archive, compared with its checksum."""
        assert self._archive is not None
        content = bytearray(entry.file_size)
        view, done = memoryview(content), 0
        file: Any
        try:
            with self._archive.open(entry) as file:
                while count := file.readinto(view[done : done + _CHUNK_BYTES]):
                    done += count
                file.read(1)  # the end, where the checksum is compared
        except zipfile.BadZipFile as error:
            raise TorchFileError(
                f"{self.path} is damaged: the content of {entry.filename} is not what was written ({error}). Get the "
                "file again. (Files that were written with torch.serialization.set_crc32_options(False) have no "
                "checksums; load such a file and save it anew.)"
            ) from error
        if done != entry.file_size:
            raise self._broken(f"{entry.filename} ends too early")
        return content

    def _open_legacy(self) -> Any:
        size = self.path.stat().st_size
        self._file.seek(0)
        file = _Limited(self._file, min(size, _MAX_PICKLE_BYTES))
        if self._interpreted(file) != _LEGACY_MAGIC or self._interpreted(file) != _LEGACY_PROTOCOL:
            raise self._broken("it does not begin as such a file does")
        system = self._interpreted(file)
        if not isinstance(system, Pairs) or system.named().get("little_endian") is not True:
            raise self._broken("it was written on a machine with another order of bytes")
        self._sizes: dict[str, int] = {}
        content = self._interpreted(file)
        keys = self._interpreted(file)
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise self._broken("it does not list its storages")
        place = file.tell()
        for key in keys:
            self._file.seek(place)
            count, width = int.from_bytes(self._file.read(8), "little"), self._sizes.get(key)
            if width is None or count * width > size - place - 8:
                raise self._broken(f"the storage {key[:40]!r} is not complete")
            self._places[key] = place + 8, count * width
            place += 8 + count * width
        return content

    # --- Tensors

    def tensor(self, node: Any) -> Tensor | None:
        """The tensor that a node of the content stands for; `None` if it stands for something else.

        Raises:
            TorchFileError: if it is not a plain tensor, not all of it is in the file, or it is damaged.
        """
        while True:
            if not isinstance(node, Call) or not isinstance(node.function, Global):
                return None
            name, arguments = node.function.name, node.arguments
            if not isinstance(arguments, tuple) or not name.startswith(("torch._utils._rebuild", "torch._tensor._reb")):
                return None
            function = name.rpartition(".")[2]
            if function in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
                node = arguments[0]
            elif function == "_rebuild_from_type_v2" and len(arguments) == 4:
                node = Call(arguments[0], arguments[2])
            else:
                break
        if function not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3") or len(arguments) < 4:
            raise TorchFileError(f"not a plain tensor ({name})")
        dtype = None
        metadata = arguments[6:]
        if function == "_rebuild_tensor_v3" and metadata:
            value = getattr(torch, metadata[0].name.rpartition(".")[2], None) if _is_dtype(metadata[0]) else None
            dtype, metadata = value, metadata[1:]
            if not isinstance(dtype, torch.dtype):
                raise TorchFileError("not a plain tensor (of an unknown type)")
        if (
            metadata
            and metadata[0] not in (None, ())
            and not (isinstance(metadata[0], Pairs) and not list(metadata[0]))
        ):
            raise TorchFileError("not a plain tensor (conjugated or negated)")
        storage, offset, shape, stride = arguments[:4]
        own, content = self._storage(storage)
        dtype = dtype or own
        shape, stride = _numbers(shape), _numbers(stride)
        if shape is None or stride is None or len(shape) != len(stride) or _numbers((offset,)) is None:
            raise TorchFileError("without a shape that makes sense")
        count = math.prod(shape)
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if count * dtype.itemsize > len(content) or (count and (last + 1) * dtype.itemsize > len(content)):
            raise TorchFileError(f"of the shape {shape}, more than the file stores of it")
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype, count=len(content) // dtype.itemsize).as_strided(
            shape, stride, offset
        )

    def _storage(self, node: Any) -> tuple[torch.dtype, bytearray]:
        """The type of a storage's elements, and its bytes."""
        described = _described(node)
        if described is None:
            raise TorchFileError("without a storage that makes sense")
        dtype, key, count = described
        if key not in self._storages:
            try:
                content = self._storage_bytes(key)
            except (KeyError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
                if isinstance(error, TorchFileError):
                    raise
                raise TorchFileError(f"whose storage {key[:40]!r} is not in the file") from error
            self._storages[key] = dtype.itemsize, content
        content = self._storages[key][1]
        if count * dtype.itemsize != len(content):
            raise TorchFileError(f"whose storage has {len(content):,} bytes, not {count:,} times {dtype.itemsize}")
        return dtype, content

    def _storage_bytes(self, key: str) -> bytearray:
        if self._archive is not None:
            return self._record(self._archive.getinfo(f"{self._prefix}data/{key}"))
        place, size = self._places[key]
        self._file.seek(place)
        content = bytearray(size)
        if self._file.readinto(content) != size:
            raise ValueError("the file ends too early")
        return content

    # --- The pickle

    def _interpreted(self, file: _Limited) -> Any:
        """What the next pickle in a file makes, of inert nodes."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[Any, Any] = {}
        argument: Any

        def since_mark() -> list[Any]:
            place = marks.pop()
            items = stack[place:]
            del stack[place:]
            return items

        for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
            self._instructions += 1
            if self._instructions > _MAX_INSTRUCTIONS:
                raise self._broken("its pickle has more instructions than the weights of a model need")
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append(Pairs())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(_last(stack, count))]
                case "LIST" | "FROZENSET":
                    stack.append(since_mark())
                case "DICT":
                    stack.append(Pairs(items=_pairs(since_mark())))
                case "APPEND":
                    item = stack.pop()
                    if isinstance(stack[-1], list):
                        stack[-1].append(item)
                case "APPENDS" | "ADDITEMS":
                    items = since_mark()
                    if isinstance(stack[-1], list):
                        stack[-1].extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    if isinstance(stack[-1], Pairs):
                        stack[-1].items.append((key, value))
                case "SETITEMS":
                    items = since_mark()
                    if isinstance(stack[-1], Pairs):
                        stack[-1].items.extend(_pairs(items))
                case "POP":
                    if marks and marks[-1] == len(stack):
                        marks.pop()
                    else:
                        stack.pop()
                case "POP_MARK":
                    since_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GLOBAL":
                    stack.append(self._global(*_old_name(argument)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    if not isinstance(name, str) or not isinstance(module, str):
                        raise ValueError("a global without a name")
                    stack.append(self._global(f"{module}.{name}"))
                case "INST":
                    arguments = tuple(since_mark())
                    stack.append(_called(self._global(*_old_name(argument)), arguments))
                case "OBJ":
                    function, *rest = since_mark()
                    stack.append(_called(function, tuple(rest)))
                case "REDUCE" | "NEWOBJ":
                    function, arguments = _last(stack, 2)
                    stack[-2:] = [_called(function, arguments)]
                case "NEWOBJ_EX":
                    function, arguments, _keywords = _last(stack, 3)
                    stack[-3:] = [_called(function, arguments)]
                case "BUILD":
                    stack.pop()  # the object's state, which no weight needs
                    stack[-1]
                case "BINPERSID":
                    stack.append(self._persistent(stack.pop()))
                case "PERSID":
                    stack.append(PersistentId(argument))
                case name if name in _VALUES:
                    stack.append(argument)
                case name:
                    raise ValueError(f"an instruction {name}")
        raise ValueError("the pickle has no end")

    def _global(self, *names: str) -> Global:
        """The last of these names, if all are allowed."""
        for name in names:
            if not self._allowed(name):
                raise RefusedGlobalError(str(self.path), name[:200] if name.isprintable() else ascii(name[:200]))
        return Global(names[-1])

    def _persistent(self, value: Any) -> PersistentId:
        node = PersistentId(value)
        described = _described(node)
        if described is not None and hasattr(self, "_sizes"):
            self._sizes[described[1]] = described[0].itemsize
        return node


class _Limited:
    """A file of which only so many bytes are read, and no line is long."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def read(self, count: int) -> bytes:
        # Else a length in the pickle would be set aside before anything is read.
        if not 0 <= count <= self._left:
            raise ValueError(f"{count:,} bytes are to follow, which are not there")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(min(self._left, _MAX_LINE_BYTES))
        self._left -= len(line)
        return line

    def tell(self) -> int:
        return self._file.tell()


# Instructions whose argument is the value.
_VALUES = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT""".split()  # noqa: SIM905
)


def _old_name(argument: str) -> list[str]:
    """The names of a global of protocols before 4; Python 2's, and what Python 3 calls it."""
    module, _, name = argument.partition(" ")
    names = [f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"]
    if (module, name) in _compat_pickle.NAME_MAPPING:
        names.append(".".join(_compat_pickle.NAME_MAPPING[module, name]))
    return names


def _called(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, Global) else ""
    if name in _DICTIONARIES or name.endswith(".AttributeDict"):
        return Pairs(arguments[0] if isinstance(arguments, tuple) and arguments else None)
    return Call(function, arguments)


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("an instruction without its arguments")
    return stack[-count:]


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _described(node: Any) -> tuple[torch.dtype, str, int] | None:
    """Type, key and number of elements of a storage."""
    value = node.value if isinstance(node, PersistentId) else None
    if not isinstance(value, tuple) or len(value) < 5 or value[0] != "storage" or not isinstance(value[1], Global):
        return None
    kind = value[1].name.rpartition(".")[2].removesuffix("Storage")
    dtype = torch.uint8 if kind == "Untyped" else _DTYPES.get(kind)
    key, count, view = value[2], value[4], value[5] if len(value) > 5 else None
    if dtype is None or type(key) is not str or type(count) is not int or count < 0 or view is not None:
        return None
    return dtype, key, count


def _is_dtype(value: Any) -> bool:
    return isinstance(value, Global) and value.name.startswith("torch.")


def _numbers(value: Any) -> tuple[int, ...] | None:
    """A shape or the like; `None` if it is something else."""
    if isinstance(value, Call) and isinstance(value.function, Global) and value.function.name == "torch.Size":
        value = value.arguments[0] if isinstance(value.arguments, tuple) and value.arguments else None
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(number) is int and 0 <= number < 2**63 for number in value) else None
