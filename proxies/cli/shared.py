"""Helpers of the `proxies` commands: reading a study's family, settings from text, the exit after a signal."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxies.config.study_file import read_toml
from scaling.common.cli import say
from scaling.common.signals import exit_code_of
from scaling.common.studies import find_study_file
from scaling.common.validation import explain_errors, format_given, list_mistakes

if TYPE_CHECKING:
    from proxies.config.proxy import ProxyConfig
    from proxies.trainers.proxy_family import ProxyFamily

Study = Annotated[str, typer.Argument(metavar="STUDY.toml | NAME", help="a study file, or the name of one in studies/")]


def read_family(study: str) -> tuple[ProxyFamily, Path]:
    """Read the [trainer] table of a study file as a family of proxies.

    Args:
        study: A path that ends in .toml, or the name of a study in `studies/`.

    Returns:
        The family and the path of the study file.

    Raises:
        ValueError: If there is no such file, or its table is not a family of proxies.
    """

    path = find_study_file(study)
    table = read_toml(path).get("trainer", {})
    if not isinstance(table, dict):
        raise ValueError(f"{path}: needed a table [trainer], got trainer = {format_given(table)}")
    use, settings = table.get("use", "proxies:ProxyFamily"), {k: v for k, v in table.items() if k != "use"}
    if use == "proxies:CommandFamily":
        raise ValueError(
            f"{path}: needed a study of proxies, which this command trains itself, got one whose runs a command trains "
            '(use = "proxies:CommandFamily"): `hpo launch` and `proxies launch` run that command'
        )
    other = "" if use == "proxies:ProxyFamily" else f" (use = {use!r}; needed a study of proxies:ProxyFamily)"
    return validate_family(settings, f"{path}, [trainer]{other}: "), path


def validate_family(settings: Mapping[str, Any], where: str = "") -> ProxyFamily:
    """Return a family of proxies with these settings.

    Args:
        settings: The settings by name.
        where: Where they come from, for the message.

    Raises:
        ValueError: If some are wrong. The message names all of them.
    """
    from pydantic import ValidationError

    from proxies.trainers.proxy_family import OTHER_NAMES, ProxyFamily

    try:
        return ProxyFamily.model_validate(settings)
    except ValidationError as error:
        problems = explain_errors(error, ProxyFamily, noun="setting", synonyms=OTHER_NAMES)
        raise ValueError(where + list_mistakes(problems)) from error


def report_interrupt(stop: KeyboardInterrupt, keep: Path | None) -> typer.Exit:
    """Print how an interrupted command can be continued, and return its exit.

    Args:
        stop: What interrupted it.
        keep: The file or folder with the state of its run, if it is kept.
    """
    advice = f"the same command continues from {keep}" if keep else "the state of the run was not kept; --keep keeps it"
    say(f"stopped; {advice}")
    return typer.Exit(exit_code_of(stop))


def configure_proxy(family: ProxyFamily, width: int, changes: list[str]) -> ProxyConfig:
    """Return the family's proxy of this width, with `name=value` settings in place of its own.

    Args:
        family: The family.
        width: d_model.
        changes: Settings as text, such as "lr=0.01"; a table is written as in TOML.

    Raises:
        ValueError: If there is no such setting, or some cannot have their values. The message names all of them.
    """
    from pydantic import ValidationError

    from proxies.config.proxy import ProxyConfig
    from proxies.trainers.proxy_family import OTHER_NAMES

    settings, problems = parse_changes(changes)
    if "d_model" in settings:
        del settings["d_model"]
        problems.append("d_model: the command sets the width itself: leave it out of --set")
    wanted = family.model_dump(exclude={"widths"}) | {"d_model": width} | settings

    def validate(values: Mapping[str, Any]) -> tuple[ProxyConfig | None, set[Any]]:
        try:
            return ProxyConfig.model_validate(values), set()
        except ValidationError as error:
            problems.extend(
                problem
                for problem in explain_errors(error, ProxyConfig, noun="setting", synonyms=OTHER_NAMES)
                if problem not in problems
            )
            return None, {item["loc"][0] for item in error.errors() if item["loc"]}

    config, wrong = validate(wanted)
    if wrong:
        # The checks of several settings together begin only when each setting by itself is right.
        validate({name: value for name, value in wanted.items() if name not in wrong})
    if problems or config is None:
        raise ValueError(list_mistakes(problems))
    return config


def parse_changes(changes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Parse the values of --set.

    Args:
        changes: Texts of the form name=value. A value in braces is a table of TOML; any other is kept as text, which
            the setting itself turns into a number.

    Returns:
        The settings by name, and what is wrong with the texts, one sentence each.
    """
    settings: dict[str, Any] = {}
    problems = []
    for text in changes:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not sign or not name:
            problems.append(f"--set: needed --set name=value, got {text!r}")
        elif name in settings:
            problems.append(f"{name}: set twice, to {settings[name]!r} and to {value!r}: leave one out")
        else:
            settings[name] = value
            if value.startswith("{"):
                try:
                    settings[name] = tomllib.loads(f"value = {value}")["value"]
                except tomllib.TOMLDecodeError as error:
                    del settings[name]
                    problems.append(f"{name}: needed a table such as {{a = 1, b = 2}}, got {value!r} ({error})")
    return settings, problems


def parse_numbers(option: str, text: str | None) -> list[int] | None:
    """Parse whole numbers with commas between them, such as "32,64"; None stays None.

    Args:
        option: The option's name, for the error message.
        text: Its value.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{option}: needed whole numbers with commas between them, such as 32,64,128, got {text!r}"
        ) from error
