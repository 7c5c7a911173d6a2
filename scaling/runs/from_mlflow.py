"""The run table of an MLflow experiment."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = ("N", "D", "lr", "batch_tokens", "seq_len", "d_model", "N_total", "N_nonembedding")
WORDS = ("parametrization", "data_sha256", "arm")


def read_runs(study: str, *, uri: str | None = None) -> pd.DataFrame:
    """The run table of a study: one row per (configuration or target, rung) that has finished, unchecked.

    A rung that was given up has the tokens and the loss of its last point, excluded as "stopped".
    """
    import pandas as pd

    from scaling.tracking.records import read_records

    rows = []
    for run in read_records(study, uri=uri, kind="run"):
        params, metrics, tags = run.params, run.metrics, run.tags
        fixed: dict[str, Any] = {k: float(params[k]) for k in NUMBERS if params.get(k) not in (None, "None")}
        fixed |= {k: params[k] for k in WORDS if k in params}
        fixed |= {"run_id": run.run_id, "name": tags.get("muscale.name"), "role": tags.get("muscale.role", "proxy")}
        for rung in sorted(int(m[1]) for k in metrics if (m := re.fullmatch(r"rung_(\d+)/tokens", k))):
            loss = metrics.get(f"rung_{rung}/loss", math.nan)
            rows.append(
                fixed
                | {
                    "rung": rung,
                    "D": metrics[f"rung_{rung}/tokens"],
                    "loss": loss,
                    "diverged": not math.isfinite(loss),
                    "seconds": metrics.get(f"rung_{rung}/seconds", math.nan),
                    "checkpoint": tags.get(f"rung_{rung}/checkpoint"),
                }
            )
        for rung in sorted(int(m[1]) for k in tags if (m := re.fullmatch(r"rung_(\d+)/stopped", k))):
            at = json.loads(tags[f"rung_{rung}/stopped"])  # its forecast is no measurement and stays there
            given_up = {"D": float(at["tokens"]), "loss": float(at["loss"]), "seconds": float(at["seconds"])}
            rows.append(fixed | given_up | {"rung": rung, "diverged": False, "final": False, "excluded": "stopped"})
    if not rows:
        raise ValueError(f"study {study!r} has no finished run yet: `hpo resume {study}` trains some")
    return pd.DataFrame(rows)
