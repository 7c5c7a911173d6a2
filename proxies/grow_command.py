"""`proxies grow`: the state of a larger model from a trained proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from scaling.cli import refusing


def grow(
    checkpoint: Annotated[Path, typer.Argument(help="a trained proxy")],
    width: Annotated[int, typer.Option(help="d_model of the grown model")],
    out: Annotated[Path, typer.Option(help="where the grown state goes, a torch file")],
    method: Annotated[
        Literal["shrink-pad-perturb", "pad", "duplicate", "hyperclone"], typer.Option()
    ] = "shrink-pad-perturb",
    shrink: Annotated[float, typer.Option(min=0, max=1)] = 0.4,
    noise: Annotated[float | None, typer.Option(min=0, help="default: the method's own")] = None,
) -> None:
    """Grow a trained proxy to a larger width of its family.

    Example: proxies grow studies/quickstart/checkpoints/0012-442368.pt --width 256 --out grown.pt
    """
    import torch

    from proxies.checkpoints import load_model
    from proxies.config import ProxyConfig
    from proxies.warmstart import grow as grow_state

    with refusing():
        if not checkpoint.is_file():
            raise ValueError(f"no checkpoint {checkpoint}")
        small, model = load_model(checkpoint)
        large = ProxyConfig.model_validate(small.model_dump() | {"d_model": width})
        state = grow_state(model.state_dict(), small, large, method=method, shrink=shrink, noise=noise)
    torch.save({"config": large.model_dump(), "model": state}, out)
    typer.echo(f"{out}: N {large.counts.N:,} from N {small.counts.N:,} by {method}")
