"""Error texts without the secrets that this process was given.

Enters: an exception, or a text that somebody else's code made. Leaves: a text for records, dashboards and logs, which
more people read than may know a key.

Standard library only.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# Names of environment variables whose values are for nobody's eyes.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
# A shorter value would be found in innocent words, and is no secret.
_SHORTEST = 8
# What stands before the host in an address; a password may hold an @ of its own.
_LOGIN = re.compile(r"(?<=://)[^/\s]+(?=@)")


def without_secrets(text: str) -> str:
    """The text less each value of an environment variable that is named like a secret, and less logins in addresses.

    A value that is the path of a file is none: the file is.

    Example:
        >>> without_secrets("cannot reach https://me:hunter2@example.org/api")
        'cannot reach https://***@example.org/api'
    """
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET.search(name) and len(value) >= _SHORTEST and not os.path.exists(value)
    }
    # A longer one may hold a shorter one.
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _LOGIN.sub(HIDDEN, text)


def described(error: BaseException) -> str:
    """What was raised and what it says, without secrets."""
    return without_secrets(f"{type(error).__name__}: {error}")
