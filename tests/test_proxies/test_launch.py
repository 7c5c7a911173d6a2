from pathlib import Path

import pandas as pd
import pytest

from proxies.family import Target
from proxies.launch import best_proxy
from scaling.runs import check_runs


def test_the_best_usable_proxy_of_the_largest_size_is_grown_and_no_confirmation(tmp_path: Path) -> None:
    kept = tmp_path / "kept.pt"
    kept.touch()
    rows = [
        ("small", 1e4, 1.0, "proxy", "", kept),
        ("good", 2e4, 2.0, "proxy", "", kept),
        ("worse", 2e4, 2.5, "proxy", "", kept),
        ("lost", 2e4, 1.5, "proxy", "", tmp_path / "gone.pt"),
        ("stopped", 2e4, 1.4, "proxy", "stopped", kept),
        ("again", 2e4, 1.3, "confirm", "", kept),
        ("target", 2e4, 1.2, "target", "", kept),
    ]
    columns = ["name", "N", "loss", "role", "excluded", "checkpoint"]
    runs = check_runs(pd.DataFrame(rows, columns=columns).assign(D=1e5, checkpoint=lambda t: t["checkpoint"].map(str)))
    target = Target(d_model=128, tokens=10**6)
    found = best_proxy(runs, target)
    assert found is not None
    assert (found.name, found.loss, found.checkpoint) == ("good", pytest.approx(2.0), kept)
    assert best_proxy(runs[runs["name"].isin(["lost", "stopped", "again", "target"])], target) is None
