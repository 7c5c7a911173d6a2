"""Read the run table of a study from its MLflow experiment."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Parameters of a run that become columns, as numbers and as text.
NUMERIC_PARAMS = ("N", "D", "lr", "batch_tokens", "seq_len", "d_model", "N_total", "N_nonembedding")
TEXT_PARAMS = ("parametrization", "data_sha256", "arm")


def read_runs(study: str, *, uri: str | None = None) -> pd.DataFrame:
    """Read the run table of a study, without checking it.

    Args:
        study: The study's name.
        uri: The store's tracking URI; by default `scaling.tracking.client.default_uri()`.

    Returns:
        One row per finished rung of each configuration or target. A rung that was stopped early has the tokens and the
        loss of its last point, and is excluded as "stopped".

    Raises:
        ValueError: If there is no such study, or if no rung has finished.
    """
    import pandas as pd

    from scaling.tracking.records import read_records

    rows = []
    for run in read_records(study, uri=uri, kind="run"):
        params, metrics, tags = run.params, run.metrics, run.tags
        shared: dict[str, Any] = {k: float(params[k]) for k in NUMERIC_PARAMS if params.get(k) not in (None, "None")}
        shared |= {k: params[k] for k in TEXT_PARAMS if k in params}
        shared |= {"run_id": run.run_id, "name": tags.get("muscale.name"), "role": tags.get("muscale.role", "proxy")}
        for rung in sorted(int(m[1]) for k in metrics if (m := re.fullmatch(r"rung_(\d+)/tokens", k))):
            loss = metrics.get(f"rung_{rung}/loss", math.nan)
            rows.append(
                shared
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
            # The tag also holds the forecast of the final loss, which is no measurement and is left out here.
            stopped = json.loads(tags[f"rung_{rung}/stopped"])
            last = {"D": float(stopped["tokens"]), "loss": float(stopped["loss"]), "seconds": float(stopped["seconds"])}
            rows.append(shared | last | {"rung": rung, "diverged": False, "final": False, "excluded": "stopped"})
    if not rows:
        raise ValueError(f"study {study!r} has no finished run yet: `hpo resume {study}` trains some")
    return pd.DataFrame(rows)
