"""The file format .safetensors: https://huggingface.co/docs/safetensors."""

import json
from pathlib import Path

import numpy as np

from stages.run.cli import UserError

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file by name, as float32.

    Raises
    ------
    UserError
        If it is no such file, it is cut off, or its numbers are of another type.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {
            name: (str(entry["dtype"]), entry["shape"], *map(int, entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not a .safetensors file, or cut off at its start") from None
    size = start + max((end for *_, end in tensors.values()), default=0)
    if size != len(content):
        raise UserError(
            f"{path}: {len(content):,} bytes, but its header says {size:,}: an incomplete copy;"
            " download it again"
        )
    if other := {dtype for dtype, *_ in tensors.values()} - _DTYPES.keys():
        raise UserError(
            f"{path}: numbers of type {', '.join(sorted(other))}; expected {', '.join(_DTYPES)}"
        )
    arrays = {}
    for name, (dtype, shape, first, end) in tensors.items():
        values = content[start + first : start + end].view(_DTYPES[dtype])
        if dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = values.astype(np.float32).reshape(shape)
    return arrays
