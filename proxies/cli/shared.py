"""Helpers of the `proxies` commands: reading a study's family, settings from text, the exit after a signal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxies.config.study_file import read_toml
from scaling.common.cli import say
from scaling.common.signals import exit_code_of
from scaling.common.studies import find_study_file

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
    from pydantic import ValidationError

    from proxies.trainers.proxy_family import ProxyFamily

    path = find_study_file(study)
    table = read_toml(path).get("trainer", {})
    try:
        return ProxyFamily.model_validate({k: v for k, v in table.items() if k != "use"}), path
    except ValidationError as error:
        raise ValueError(f"{path}, table [trainer]: {error}; `hpo validate {path}` shows more") from error


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
    """Return the family's proxy of this width, with `name=value` settings in place of its own."""
    from proxies.config.proxy import ProxyConfig

    if wrong := [s for s in changes if "=" not in s]:
        raise ValueError(f"needed --set name=value, got {', '.join(wrong)}")
    settings: dict[str, Any] = dict(s.split("=", 1) for s in changes)
    return ProxyConfig.model_validate(family.model_dump(exclude={"widths"}) | {"d_model": width} | settings)


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
