"""What the commands of `proxies` share: their study, settings from text, their end when they are told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxies.config.study_file import read_toml
from scaling.common.signals import exit_code_of
from scaling.common.studies import find_study_file

if TYPE_CHECKING:
    from proxies.config.proxy import ProxyConfig
    from proxies.trainers.proxy_family import ProxyFamily

Study = Annotated[str, typer.Argument(metavar="STUDY.toml | NAME", help="a study file, or the name of one in studies/")]


def read_family(study: str) -> tuple[ProxyFamily, Path]:
    """The [trainer] table of a study file, by path or name, as a family of proxies."""
    from pydantic import ValidationError

    from proxies.trainers.proxy_family import ProxyFamily

    path = find_study_file(study)
    table = read_toml(path).get("trainer", {})
    try:
        return ProxyFamily.model_validate({k: v for k, v in table.items() if k != "use"}), path
    except ValidationError as error:
        raise ValueError(f"{path}, table [trainer]: {error}; `hpo validate {path}` says more") from error


def interrupted(stop: KeyboardInterrupt, keep: Path | None) -> typer.Exit:
    """The end of a command that was told to stop, and what is left of its run."""
    left = f"the same command goes on from {keep}" if keep else "nothing was kept: --keep would have"
    typer.echo(f"stopped; {left}", err=True)
    return typer.Exit(exit_code_of(stop))


def configured(family: ProxyFamily, width: int, changes: list[str]) -> ProxyConfig:
    """The family's proxy of this width with `name=value` settings in place of its own."""
    from proxies.config.proxy import ProxyConfig

    if wrong := [s for s in changes if "=" not in s]:
        raise ValueError(f"needed --set name=value, got {', '.join(wrong)}")
    settings: dict[str, Any] = dict(s.split("=", 1) for s in changes)
    return ProxyConfig.model_validate(family.model_dump(exclude={"widths"}) | {"d_model": width} | settings)


def numbers(option: str, text: str | None) -> list[int] | None:
    """'32,64' as [32, 64]; None where nothing is given."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{option}: needed whole numbers with commas between, such as 32,64,128, got {text!r}"
        ) from error
