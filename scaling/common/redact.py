"""Keep passwords out of everything that is shown or recorded: URLs, messages, and study files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus

HIDDEN = "***"
# scheme://user:password@. Passwords contain characters that should be quoted (@, /, ?), and SQLAlchemy writes spaces. A
# port is not a password.
USER = re.compile(
    r"([a-z][\w+.-]*://)(?:([^\s/:?#'\"]*):(?:[^\s?'\"]*@|(?!\d+(?:[/?#]|$))(?:[^\s@]*|[^@/\n]*)@)|([^\s/:@?#'\"]*)@)",
    re.IGNORECASE,
)
# The key and the value of a query parameter, or of a key=value pair of libpq.
VALUE = re.compile(r"([\w.%+-]+)(=)('[^']*'|\"[^\"]*\"|[^&;,\s'\"]+)")
# The name of a setting that holds a credential.
NAME = re.compile(
    r"(pass(wor[dt]|wd|phrase)?|pwd|secret|credentials?|(api|access|secret|private|account)[-_.]?key"
    r"|(auth|access|api|bearer|hub|id|refresh|security|session)[-_.]?token)$",
    re.IGNORECASE,
)
# Names that hold a credential in a URL. Elsewhere these words are too common.
IN_URL = re.compile(r"(^|[-_.])(token|sig|signature|auth|key)$", re.IGNORECASE)
# An environment variable that holds a credential, such as HF_TOKEN.
VARIABLE = re.compile(r"([A-Z0-9]+_)+(TOKEN|KEY|PASS)")


def redact_passwords(text: object) -> str:
    """Replace passwords in a text by ***.

    These are passwords in URLs, and the values of query parameters and key=value pairs whose names mean a credential. A
    web address also loses its user, because git and API servers accept a token there.

    Args:
        text: A URL, or any text that may contain URLs.

    Returns:
        The text without passwords.
    """

    def redact_user(match: re.Match[str]) -> str:
        scheme, name, user_only = match.groups()
        if "http" in scheme.lower():
            return f"{scheme}{HIDDEN}@"
        return f"{scheme}{name}:{HIDDEN}@" if user_only is None else f"{scheme}{user_only}@"

    def redact_value(match: re.Match[str]) -> str:
        name = unquote_plus(match[1])
        in_query = match.start() > 0 and match.string[match.start() - 1] in "?&"
        is_secret = NAME.search(name) or (in_query and IN_URL.search(name))
        return f"{match[1]}={HIDDEN}" if is_secret else match[0]

    without_users = USER.sub(redact_user, str(text))
    return VALUE.sub(redact_value, without_users)


def find_secrets(table: Mapping[str, Any]) -> list[str]:
    """Find settings that hold a credential: by their names, or because they contain a URL with a password.

    Args:
        table: Settings, nested to any depth.

    Returns:
        One line for each such setting.
    """
    return [
        f"{path}: {reason}; settings are recorded with the run: pass it through an environment variable instead"
        for path, reason in _walk_secrets("", table)
    ]


def _walk_secrets(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each setting below `value` that holds a credential, and the reason."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk_secrets(f"{path}.{key}" if path else str(key), item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _walk_secrets(f"{path}.{i}", item)
    elif isinstance(value, str):
        name = path.rpartition(".")[2]
        if value and (NAME.search(name) or VARIABLE.fullmatch(name)):
            yield path, "is a credential by its name"
        elif redact_passwords(value) != value:
            yield path, "holds a password"
