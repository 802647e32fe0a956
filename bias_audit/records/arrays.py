"""Arrays of a run as the bytes of .npz files, and back: checked by their sizes before anything is unpacked.

Enters: a `SampleSheet`, `SampleScores` or `ChangedPictures`, or the content of a file that may come from anywhere.
Leaves: the bytes, or the same read back. Where the files lie is for `files` to know.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bias_audit.records.errors import RecordError
from bias_audit.records.samples import ChangedPictures, PackedMasks, SampleScores, SampleSheet, SampleTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A record that unpacks to more is neither written nor read: a small file can be made that fills any memory.
MOST_UNPACKED = 4 << 30
# An array in which nothing is stored, such as no attributes of many samples, has at most so many rows.
MOST_EMPTY = 1 << 24
_NOT_READ = "it is damaged or was not written by this tool: record the run again"


def scores_bytes(scores: SampleScores) -> bytes:
    """The content of an audit's file in `audits/`."""
    return npz_bytes(vars(scores))


def read_scores(path: Path, content: bytes) -> SampleScores:
    """The scores in such a file; `path` is where it is said to be.

    Raises:
        RecordError: it is damaged.
    """
    arrays = load_npz(path, content, tuple(f.name for f in fields(SampleScores)))
    for name in ("metrics", "methods", "regions", "ids", "effect_metrics"):
        arrays[name] = tuple(str(x) for x in arrays[name])
    return SampleScores(**arrays)


def sheet_bytes(sheet: SampleSheet) -> bytes:
    """The content of `samples.npz`."""
    import numpy as np

    return npz_bytes(
        {
            "ids": sheet.ids,
            "labels": sheet.labels,
            "attributes": sheet.attributes,
            **_packed("thumbnails", "thumbnail_lengths", sheet.thumbnails),
            "masks": sheet.masks.bits,
            "masks_shape": np.array(sheet.masks.shape, dtype=np.int64),
        }
    )


def read_sheet(path: Path) -> SampleSheet:
    """The sheet in `samples.npz`.

    Raises:
        RecordError: it is missing or damaged.
    """
    names = ("ids", "labels", "attributes", "thumbnails", "thumbnail_lengths", "masks", "masks_shape")
    arrays = _load_samples(path, names)
    thumbnails = _unpacked(path, arrays["thumbnails"], arrays["thumbnail_lengths"])
    bits, shape = arrays["masks"], arrays["masks_shape"]
    sizes = shape.tolist() if (shape.dtype, shape.shape) == ("int64", (4,)) else [-1] * 4
    if bits.dtype != "uint8" or bits.shape != (*sizes[:3], -(-sizes[3] // 8)):
        raise RecordError(f"{path}: its masks are not as large as it says: {_NOT_READ}")
    masks = PackedMasks(bits, sizes[3])
    return SampleSheet(tuple(str(i) for i in arrays["ids"]), arrays["labels"], arrays["attributes"], thumbnails, masks)


def read_table(path: Path) -> SampleTable:
    """The sheet in `samples.npz` less its pictures and masks, which are not unpacked.

    Raises:
        RecordError: it is missing or damaged.
    """
    arrays = _load_samples(path, ("ids", "labels", "attributes"))
    return SampleTable(tuple(str(i) for i in arrays["ids"]), arrays["labels"], arrays["attributes"])


def _load_samples(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    try:
        # From the file: what is not asked for is passed over.
        return load_npz(path, path.open("rb"), names)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}): the run directory is incomplete") from error


def changed_bytes(changed: ChangedPictures) -> bytes:
    """The content of `changed.npz`."""
    content = {name: value for name, value in vars(changed).items() if name != "pictures"}
    return npz_bytes(content | _packed("pictures", "lengths", changed.pictures))


def read_changed(path: Path) -> ChangedPictures | None:
    """What is in `changed.npz`; None where there is none.

    Raises:
        RecordError: it is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    arrays = load_npz(path, content, (*(f.name for f in fields(ChangedPictures)), "lengths"))
    pictures = _unpacked(path, arrays.pop("pictures"), arrays.pop("lengths"))
    for name in ("ids", "kinds", "regions", "attributes", "values"):
        arrays[name] = tuple(str(x) for x in arrays[name])
    return ChangedPictures(**arrays | {"step": int(arrays["step"]), "pictures": pictures})


def _packed(name: str, lengths: str, parts: Sequence[bytes]) -> dict[str, Any]:
    """Byte strings as two arrays: all of them one after the other, and how long each is."""
    import numpy as np

    data = np.frombuffer(b"".join(parts), dtype=np.uint8)
    return {name: data, lengths: np.array([len(part) for part in parts], dtype=np.int64)}


def _unpacked(path: Path, data: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64]) -> tuple[bytes, ...]:
    ends = lengths.cumsum()
    # Lengths that go back and forth would make many copies of the same bytes.
    if len(lengths) and (lengths.min() < 0 or lengths.sum() != data.nbytes):
        raise RecordError(f"{path}: its pictures are not as long as it says: {_NOT_READ}")
    return tuple(data[end - n : end].tobytes() for end, n in zip(ends, lengths, strict=True))


def npz_bytes(arrays: dict[str, Any]) -> bytes:
    """A compressed .npz whose bytes depend on the arrays alone, not on the time of writing.

    Raises:
        RecordError: `load_npz` would not read it.
    """
    import numpy as np

    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    size = sum(array.nbytes for array in arrays.values())
    if size > MOST_UNPACKED - (1 << 20):
        raise RecordError(f"a record of {size} bytes is too large, {MOST_UNPACKED} are read: audit fewer samples")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def load_npz(path: Path, content: bytes | BinaryIO, names: tuple[str, ...]) -> dict[str, Any]:
    """The arrays with these names in a .npz; `path` is where it is said to be.

    Raises:
        RecordError: it is damaged, lacks one of them, or unpacks to more than any record; this is known before it is
            unpacked.
    """
    try:
        with (
            io.BytesIO(content) if isinstance(content, bytes) else content as file,
            zipfile.ZipFile(file) as archive,
        ):
            _check_sizes(path, archive)
            return {name: _array(path, _member(archive, f"{name}.npy")) for name in names}
    except RecordError:
        raise
    except Exception as error:
        # A damaged archive raises whatever its parts do: zlib.error, EOFError, NotImplementedError, struct.error ...
        raise RecordError(f"{path}: is not a whole .npz file ({error}): record the run again") from error


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise if an archive could unpack to more than `MOST_UNPACKED`: what it says of itself is all that is unpacked."""
    size = sum(member.file_size for member in archive.infolist())
    if size > MOST_UNPACKED:
        raise RecordError(f"{path}: unpacks to {size} bytes, expected at most {MOST_UNPACKED}: {_NOT_READ}")
    # Of others zipfile may unpack a whole piece of the file before it looks how much that was.
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in archive.infolist()):
        raise RecordError(f"{path}: is compressed in a way that no record is: {_NOT_READ}")


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        # Without a number it would unpack all that is there before it looks how much was to be.
        return member.read(archive.getinfo(name).file_size)


def _array(path: Path, content: bytes) -> npt.NDArray[Any]:
    """The array in a .npy; one of nothing may still say that it has any number of rows."""
    import numpy as np

    member = io.BytesIO(content)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, kind = header[np.lib.format.read_magic(member)](member)
    cells = math.prod(max(1, length) for length in shape)
    stored = len(content) - member.tell()
    sound = math.prod(shape) * kind.itemsize == stored and cells <= max(stored, MOST_EMPTY)
    if not sound and not kind.hasobject:  # Objects are refused below.
        raise RecordError(f"{path}: an array of {shape} is said to be in {stored} bytes: {_NOT_READ}")
    array: npt.NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return array
