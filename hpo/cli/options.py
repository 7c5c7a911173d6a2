"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from scaling.common.cli import refusing

Study = Annotated[str, typer.Argument(metavar="STUDY.toml | NAME", help="a study file, or the name of one in studies/")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="MUSCALE_STORAGE",
        metavar="URL",
        help="where the study is kept: postgresql://..., grpc://HOST:PORT, ...; default: its journal file",
    ),
]
Count = Annotated[int | None, typer.Option("--workers", min=1, help="how many workers; default: the study's")]
Executor = Annotated[
    str, typer.Option(metavar="local|ray", help="where workers run: processes here, or nodes of a Ray cluster")
]
Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="head of the Ray cluster; auto: this machine's")]


def choose_cluster(executor: str, address: str) -> str | None:
    """Return the address of the Ray cluster to run on, or None to run locally. Refuse an address without a cluster."""
    with refusing():
        if executor not in ("local", "ray"):
            raise ValueError(f"needed --executor local or ray, got {executor!r}")
        if executor == "local":
            return None
        from hpo.launch.ray_cluster import RayCluster

        with RayCluster(address):
            return address
