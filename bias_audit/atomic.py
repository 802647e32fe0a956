"""Files that are written whole or not at all.

Enters: a path and its content. Leaves: the file, on disk; where that fails or the process is killed, the file that was
there before.

Standard library only: whoever writes a file can use it.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent, and on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clear_leftovers(folder: Path) -> None:
    """Remove what writers left in a folder that were killed while they wrote a file whole."""
    for file in folder.glob(".*.tmp"):
        writer = file.name.split(".")[-2]
        if writer.isdigit() and not _is_another(int(writer)):
            file.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Whether a process of this number lives that is not this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is someone else's.
        return True
    return True


def named(error: OSError, path: Path) -> OSError:
    """The same error, with the file that a person knows: a full disk names none."""
    return OSError(error.errno, error.strerror, str(path))
