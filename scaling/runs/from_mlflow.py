"""Read the run table of a study from its MLflow experiment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from scaling.tracking.records import RunRecord

# Parameters of a run that become columns, as numbers and as text.
NUMERIC_PARAMS = ("N", "D", "lr", "batch_tokens", "seq_len", "d_model", "N_total", "N_nonembedding")
TEXT_PARAMS = ("parametrization", "data_sha256", "arm")


def read_cells(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Return the runs of another program's experiment as cells, one row per run.

    Args:
        records: The runs.

    Returns:
        The columns run_id, name, state, and params.X, metrics.X and tags.X. A metric that is not finite is text, so
        that it differs from a missing one. The index is the run id, so that an error message names the run of a
        mistake.
    """
    import pandas as pd

    rows = []
    for r in records:
        row: dict[str, Any] = {"run_id": r.run_id, "name": r.name, "state": r.status}
        row |= {f"params.{k}": None if v == "None" else v for k, v in r.params.items()}
        row |= {f"metrics.{k}": v if math.isfinite(v) else str(v) for k, v in r.metrics.items()}
        row |= {f"tags.{k}": v for k, v in r.tags.items() if not k.startswith("mlflow.")}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    index = [r.run_id for r in records]
    return pd.DataFrame({n: pd.Series([row.get(n) for row in rows], index, dtype=object) for n in names})


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
