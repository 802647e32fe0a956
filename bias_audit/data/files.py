"""What every reader of files needs: names that stay within their folder, near names, what a folder holds, sizes.

Enters: names and paths as files and people give them. Leaves: the same, checked.
"""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from bias_audit.data.annotations import Misfit
from bias_audit.data.outlines import MOST_PIXELS, PROGRAMS

# What Pillow has suffixes for, but no pixels: it writes some, and of others it knows the kind only.
_NO_PICTURES = (*PROGRAMS, "PDF", "PALM", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")


def leaves(name: str) -> bool:
    """Whether a name from a file is not that of something in the folder it is looked for in, on any system: of the
    folder itself, or of something outside of it.

    Example:
        >>> leaves("ward/a.jpg"), leaves("../a.jpg"), leaves("C:\\\\a.jpg"), leaves(".")
        (False, True, True, True)
    """
    anywhere = PureWindowsPath(name)
    return not anywhere.name or bool(Path(name).anchor or anywhere.root) or ".." in anywhere.parts


def unfound(name: str, folder: str | Path) -> str:
    """Why a file of this name cannot be had from a folder, and what to do; "" if it can.

    Symbolic links are followed: whoever owns the folder has put them there.
    """
    if leaves(name):
        return f"{name!r} leaves the folder {folder}: write the path below that folder"
    # Not `is_file`, which raises where a name is too long.
    if not os.path.isfile(Path(folder) / name):
        return f"no file {Path(folder) / name}: check the folder, or remove it here"
    return ""


def near(name: str, known: Iterable[str]) -> str:
    """A question whether one of the known names was meant, or else what is known.

    Example:
        >>> near("hairs", ["hair", "face"])
        "did you mean 'hair'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known)
    if close:
        return "did you mean " + " or ".join(repr(n) for n in close) + "?"
    return f"there are {known[:20]}" + (" and more" if len(known) > 20 else "")


def pictures_in(folder: Path) -> list[str]:
    """The pictures in a folder and below it, known by their suffixes: paths below it with "/", sorted.

    Hidden ones are passed over: archives made on a Mac hold some that are none.
    """
    Image.init()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name not in _NO_PICTURES}
    return [one for one in files_in(folder) if PurePosixPath(one).suffix.lower() in suffixes]


def files_in(folder: Path, suffix: str = "") -> list[str]:
    """The files in a folder and below it that are not hidden: paths below it with "/", sorted."""
    found = (one.relative_to(folder) for one in folder.rglob(f"*{suffix}") if one.is_file())
    return sorted(one.as_posix() for one in found if not any(part.startswith(".") for part in one.parts))


def size_of(path: Path) -> tuple[int, int]:
    """A picture's (height, width) as it is stored, read from its header alone.

    Raises:
        ValueError: it is no picture, or has more pixels than are decoded; says which file.
    """
    try:
        Image.init()
        with Image.open(path, formats=[name for name in Image.OPEN if name not in PROGRAMS]) as found:
            width, height = found.size
    # As in `outlines.picture`.
    except Exception as error:
        raise ValueError(f"{path}: {error}: replace the file, or remove its annotations") from error
    if height * width > MOST_PIXELS:
        raise ValueError(f"{path}: has {width} x {height} pixels, at most {MOST_PIXELS} are decoded: make it smaller")
    return height, width


def read_bytes(path: Path, kind: str) -> bytes:
    """All of a file.

    Raises:
        Misfit: it cannot be read; says which file, and what `kind` of file was expected.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise Misfit([f"{path}: cannot be read ({error.strerror}): give the path of {kind}"]) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that has the name `path` once the block has ended well, and is gone if it has not.

    Raises:
        ValueError: `path` is there already and is no empty folder.

    Example:
        >>> with whole_folder(Path("masks")) as folder:  # doctest: +SKIP
        ...     (folder / "hair").mkdir()
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is there already: name a folder that is not there, or an empty one")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield made
        # mkdtemp makes a folder that nobody else may open.
        made.chmod(0o777 & ~_umask())
        made.replace(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
