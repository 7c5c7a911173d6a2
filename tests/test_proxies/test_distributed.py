"""The same steps, whatever runs them: compiled, data parallel, sharded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from proxies.checks import coordinate_check
from proxies.config import ProxyConfig
from proxies.trails import Engine, Trail, Watch, follow


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    text = tmp_path / "text.txt"
    text.write_text("all the world's a stage, and all the men and women merely players " * 400)
    config = ProxyConfig(
        base_width=16,
        d_model=32,
        d_head=8,
        q_per_kv=2,
        qk_norm=True,
        base_layers=1,
        seq_len=16,
        lr=0.02,
        corpus=str(text),
    )
    return Watch(config, "activations", 4, 4)


def distance(a: Trail, b: Trail) -> float:
    """Largest relative difference of any quantity that is not zero, at any step, and of the losses."""
    pairs = [
        (x, y) for s, t in zip(a.seen, b.seen, strict=True) for name in s for x, y in zip(s[name], t[name], strict=True)
    ]
    return max(abs(x - y) / y for x, y in [*pairs, *zip(a.losses, b.losses, strict=True)] if y > 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")  # torch's own, when its compiler loads
@pytest.mark.parametrize("engine", ["compile", "ddp", "fsdp2"])
def test_every_engine_has_the_coordinates_of_the_plain_model(watch: Watch, engine: Engine) -> None:
    """Groups are made by name after wrapping; under FSDP2 of sharded tensors."""
    if engine == "compile":  # a model takes a minute to compile, mostly for its blocks
        watch = replace(watch, config=watch.config.model_copy(update={"n_layers": 1}))
    exact = replace(watch, double=True)
    roles = ("embedding", "hidden", "norm", "qk_norm", "final_norm", "readout")
    stressed = replace(exact, what="eps", scales=dict.fromkeys(roles, 1e-3))
    plain = follow([exact, watch, stressed])
    same = follow([exact, watch, stressed], engine)
    assert plain[0].seen[-1]["block 0 stream"][1] > 0.01, "nothing moved"
    assert distance(same[0], plain[0]) < 1e-11  # float64; measured 1e-14
    assert distance(same[1], plain[1]) < 2e-5  # float32; measured 3e-6
    rows = [(same[2].seen[0][role][1], plain[2].seen[0][role][1]) for role in plain[2].seen[0]]
    assert len(rows) == 6
    assert all(a == pytest.approx(b, rel=1e-11) for a, b in rows)


@pytest.mark.slow
def test_the_check_itself_runs_on_two_ranks(watch: Watch) -> None:
    plain = coordinate_check(watch.config, (16, 32, 64), seeds=1, steps=2)
    sharded = coordinate_check(watch.config, (16, 32, 64), seeds=1, steps=2, engine="fsdp2")
    assert [(s.where, s.what) for s in sharded.slopes] == [(s.where, s.what) for s in plain.slopes]
    assert [s.value for s in sharded.slopes] == pytest.approx([s.value for s in plain.slopes], abs=1e-3)
