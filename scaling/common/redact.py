"""No password leaves this program: URLs and messages are shown without them, and study files must not hold any."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus

HIDDEN = "***"
# scheme://user:password@. People write into a password what should be quoted (@, /, ?), SQLAlchemy a space; a port is none.
USER = re.compile(
    r"([a-z][\w+.-]*://)(?:([^\s/:?#'\"]*):(?:[^\s?'\"]*@|(?!\d+(?:[/?#]|$))(?:[^\s@]*|[^@/\n]*)@)|([^\s/:@?#'\"]*)@)",
    re.IGNORECASE,
)
VALUE = re.compile(r"([\w.%+-]+)(=)('[^']*'|\"[^\"]*\"|[^&;,\s'\"]+)")  # of a query, of libpq's key=value
NAME = re.compile(
    r"(pass(wor[dt]|wd|phrase)?|pwd|secret|credentials?|(api|access|secret|private|account)[-_.]?key"
    r"|(auth|access|api|bearer|hub|id|refresh|security|session)[-_.]?token)$",
    re.IGNORECASE,
)
IN_URL = re.compile(r"(^|[-_.])(token|sig|signature|auth|key)$", re.IGNORECASE)  # too common a word elsewhere
VARIABLE = re.compile(r"([A-Z0-9]+_)+(TOKEN|KEY|PASS)")  # of the environment, such as HF_TOKEN


def redact_passwords(text: object) -> str:
    """A URL, or a text with URLs in it, with *** for passwords, and for query parameters and key=value pairs that hold one.

    A web address loses its user, too: what git and API servers call so may be a token.
    """

    def user(found: re.Match[str]) -> str:
        scheme, name, alone = found.groups()
        if "http" in scheme.lower():
            return f"{scheme}{HIDDEN}@"
        return f"{scheme}{name}:{HIDDEN}@" if alone is None else f"{scheme}{alone}@"

    def value(found: re.Match[str]) -> str:
        name = unquote_plus(found[1])
        in_query = found.start() > 0 and found.string[found.start() - 1] in "?&"
        secret = NAME.search(name) or (in_query and IN_URL.search(name))
        return f"{found[1]}={HIDDEN}" if secret else found[0]

    without_user = USER.sub(user, str(text))
    return VALUE.sub(value, without_user)


def find_secrets(table: Mapping[str, Any]) -> list[str]:
    """One line for each setting, at any depth, that is a password by its name, or is or holds a URL with one."""
    return [
        f"{where}: {why}; settings are written to the record: put it into the environment of the shell instead"
        for where, why in _secrets("", table)
    ]


def _secrets(where: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(f"{where}.{key}" if where else str(key), item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _secrets(f"{where}.{i}", item)
    elif isinstance(value, str):
        name = where.rpartition(".")[2]
        if value and (NAME.search(name) or VARIABLE.fullmatch(name)):
            yield where, "is a credential by its name"
        elif redact_passwords(value) != value:
            yield where, "holds a password"
