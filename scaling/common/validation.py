"""Say what is wrong with a setting in one sentence that names it, instead of in the words of pydantic."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from scaling.common.suggest import did_you_mean

if TYPE_CHECKING:
    from pydantic import ValidationError

# What was needed, by the type of pydantic's error. A name in braces is one of the limits that the error carries.
NEEDED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "bytes_type": "text",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "path_type": "a path",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_sub_type": "text",
    "string_type": "text",
    "string_unicode": "text in UTF-8",
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} values",
    "tuple_type": "a list",
}
# Parts of an error's place that name a member of a union of types, not a field.
UNION_MEMBER = re.compile(r"(str|int|float|bool|nullable|(dict|tuple|list|union|literal|constrained|function|lax)\b.*)")
# Most characters of a wrong value that a message shows.
SHOWN_CHARACTERS = 80


def explain_errors(
    error: ValidationError, model: Any = None, *, noun: str = "key", synonyms: Mapping[str, str] = {}
) -> list[str]:
    """Return pydantic's errors as sentences of the form `field: what was needed, what was given`.

    Args:
        error: The errors of a whole model.
        model: The model, whose field names are suggested for unknown ones. None: without suggestions.
        noun: What an unknown name is called.
        synonyms: Names of fields by what other programs call them.

    Returns:
        One sentence per mistake. A check of several fields may report several mistakes, one per line of its message.
    """
    # What was needed and what was given, by field: a value that fits no member of a union is one mistake.
    types: dict[tuple[str, str], list[str]] = {}
    sentences: list[str | tuple[str, str]] = []
    items = error.errors()
    # A list is too short when its members are wrong, which is the mistake.
    faulty = {item["loc"][:length] for item in items for length in range(len(item["loc"]))}
    for item in items:
        if item["type"] == "too_short" and item["loc"] in faulty:
            continue
        loc = [part for i, part in enumerate(item["loc"]) if not (i and UNION_MEMBER.fullmatch(str(part)))]
        where = ".".join(str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            name, known = str(loc[-1]), _list_fields(model, loc[:-1])
            if synonyms.get(name.lower()) in known:
                hint = f"did you mean {synonyms[name.lower()]}?"
            else:
                hint = did_you_mean(name, known, cutoff=0.55) or (f"known {noun}s: {', '.join(known)}" if known else "")
            sentences.append(f"{where}: unknown {noun}; {hint}".rstrip("; "))
        elif item["type"] == "missing":
            sentences.append(f"{where}: missing")
        elif item["type"] == "literal_error":
            expected = str(item["ctx"]["expected"])
            choices = expected.replace("'", "").replace(" or ", ", ").split(", ")
            hint = did_you_mean(str(item["input"]), choices, before="; ")
            sentences.append(f"{where}: needed {expected}, got {format_given(item['input'])}{hint}")
        elif item["type"] == "value_error":
            # An error that concerns several fields has no place. Each line of its message begins with their names.
            lines = str(item["ctx"]["error"]).splitlines() or [""]
            sentences += [f"{where}: {line}" for line in lines] if where else lines
        else:
            key = where, format_given(item["input"])
            if key not in types:
                sentences.append(key)
            types.setdefault(key, []).append(_describe_needed(item))
    return [
        line if isinstance(line, str) else f"{line[0]}: needed {_join(types[line])}, got {line[1]}".removeprefix(": ")
        for line in sentences
    ]


def list_mistakes(sentences: Sequence[str]) -> str:
    """Return sentences as one message: a single one by itself, several below their number."""
    if len(sentences) == 1:
        return sentences[0]
    return f"{len(sentences)} mistakes\n" + "\n".join(f"  {sentence}" for sentence in sentences)


def format_given(value: Any) -> str:
    """Return a wrong value as a message shows it: as JSON, or else as Python writes it, shortened."""
    if isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    elif isinstance(value, str):
        text = repr(value)
    else:
        text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 4]} ..."


def _describe_needed(item: Mapping[str, Any]) -> str:
    template = NEEDED.get(item["type"])
    if template is not None:
        limits = {
            k: f"{v:,}" if isinstance(v, int) else f"{v:g}" if isinstance(v, float) else v
            for k, v in item.get("ctx", {}).items()
        }
        return template.format_map(limits)
    message = str(item["msg"])
    for beginning in ("Input should be ", "Value should be ", "Value should ", "Input should "):
        message = message.removeprefix(beginning)
    return message[0].lower() + message[1:]


def _join(needed: Sequence[str]) -> str:
    """Return alternatives with "or" between them, each once."""
    different = list(dict.fromkeys(needed))
    if "a finite number" in different:
        return "a finite number"
    if "a whole number" in different and "a number" in different:
        different.remove("a whole number")
    return " or ".join([", ".join(different[:-1]), different[-1]] if len(different) > 1 else different)


def _list_fields(model: Any, loc: Sequence[int | str]) -> list[str]:
    """Return the field names of the (nested) model at `loc`, in alphabetical order."""
    for part in loc:
        fields: Mapping[str, Any] = getattr(model, "model_fields", {})
        inside_dict = (get_args(model) or (model,))[-1]
        model = fields[str(part)].annotation if part in fields else inside_dict
    return sorted(getattr(model, "model_fields", {}))
