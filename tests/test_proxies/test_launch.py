"""Launch plans: their text, what is refused before compute is spent, how a run is monitored and scored."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from proxies.cli.launch import apply_options
from proxies.config.proxy import ProxyConfig
from proxies.launch.arms import ArmResult, build_commands, format_commands
from proxies.launch.monitor import BandMonitor, Excursion, format_excursion, predict_band, score_arms
from proxies.launch.plan import LaunchPlan, WarmStart, compute_peak_rates, read_plan, write_plan
from proxies.launch.planner import attach_growth_advice, describe_staleness, find_best_proxy
from proxies.launch.preflight import check_launch, estimate_disk_bytes
from proxies.trainers.proxy_family import Target
from scaling.advice.recommendation import recommend
from scaling.common.measurement import Measurement
from scaling.curves.planned import LossBand
from scaling.runs.table import check_runs, hash_table

CONFIG = ProxyConfig(d_model=32, base_width=16, d_head=16, n_layers=1, seq_len=16, batch_seqs=4, warmup_tokens=64)
TOKENS = 4096
BAND = LossBand((512.0, 2048.0), (4.0, 3.0), (3.5, 2.6), (4.5, 3.4), 0.95, 9, 1.0)
BECAUSE: dict[str, Any] = {
    "N": float(CONFIG.counts.N),
    "D": float(TOKENS),
    "lr": CONFIG.lr,
    "batch_tokens": 64.0,
    "loss": 2.0,
    "loss_interval": [1.8, 2.0**2 / 1.8],
    "mass": 0.9,
    "loss_law": {"E": 1.0, "A": 10.0, "B": 100.0, "alpha": 0.5, "beta": 0.5},
    "provenance": {"n_runs": 12, "n_groups": 4, "version": "0.1", "table_sha256": "0" * 64},
    "flags": [{"name": "edge", "text": "The best rate is at the edge.", "serious": True}],
    "runs": ["config-0000", "config-0001"],
}
WARM = WarmStart(name="config-0003", checkpoint=Path("gone.pt"), N=4000, tokens=2000, loss=2.5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("all the world's a stage, and all the men and women merely players " * 400)
    return path


def plan(**changes: Any) -> LaunchPlan:
    return LaunchPlan.model_validate(
        {
            "study": "s",
            "config": CONFIG,
            "tokens": TOKENS,
            "because": BECAUSE,
            "rates": compute_peak_rates(CONFIG),
            "curve": BAND,
        }
        | changes
    )


def point(tokens: int, loss: float, *, final: bool = False) -> Measurement:
    return Measurement(tokens, loss, final=final)


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
    best = find_best_proxy(runs, target)
    assert best is not None
    assert (best.name, best.loss, best.checkpoint) == ("good", pytest.approx(2.0), kept)
    assert find_best_proxy(runs[runs["name"].isin(["lost", "stopped", "again", "target"])], target) is None


def test_rates_are_those_of_the_muP_table_at_the_targets_width() -> None:
    lr = CONFIG.lr
    by_hand = {"embedding": lr, "norm": lr, "hidden": lr / 2, "final_norm": lr, "readout": lr}
    assert compute_peak_rates(CONFIG) == pytest.approx(by_hand)
    assert "qk_norm" in compute_peak_rates(CONFIG.model_copy(update={"qk_norm": True}))
    assert "readout" not in compute_peak_rates(
        ProxyConfig.model_validate(CONFIG.model_dump() | {"tied": True, "embed_std": 0.2})
    )


def test_a_plan_shows_everything_and_comes_back_from_its_file(tmp_path: Path) -> None:
    made = plan(warm=WARM, seconds=90, ranks=2, engine="ddp")
    write_plan(made, tmp_path / "new" / "plan.json")
    assert read_plan(tmp_path / "new" / "plan.json") == made
    text = " ".join(str(made).split())
    for part in (
        "hidden 0.003906",
        "batch 4 x 16 = 64 tokens",
        "wsd: warm-up over 64 tokens, cooldown over the last 20 % by 1-sqrt",
        "loss 2.0000, 90 % interval (1.8000, 2.2222), trained from scratch",
        "95 % band from 9 curves: 512 tokens 4.000 (3.500, 4.500)",
        "about 1.5 minutes on one core; arms: warm, scratch",
        "1 x 2 processes, engine ddp, at most 3 restarts",
        "config-0003 (N 4,000, 2,000 tokens, loss 2.5000; training it cost 4.80e+07 FLOPs), grown by",
        "grown by shrink-pad-perturb, shrink 0.4, from gone.pt",
        "12 runs in 4 (N, D) groups: config-0000, config-0001; muscale 0.1",
        "SERIOUS DOUBT: The best rate is at the edge.",
    ):
        assert part in text
    assert all(len(line) <= 80 for line in str(made).splitlines())
    assert f"{made.flops:.2e} FLOPs" in text
    assert "NOT AS RECOMMENDED" not in text
    other = plan(config=CONFIG.model_copy(update={"lr": 0.5}), rates={})
    assert "NOT AS RECOMMENDED: lr 0.5, recommended 0.007812" in " ".join(str(other).split())


def test_what_is_trained_names_a_plan_and_not_how_many_processes_train_it() -> None:
    first = plan(warm=WARM)
    assert plan(warm=WARM, ranks=2, engine="fsdp2", seconds=1, because=BECAUSE | {"loss": 2.1}).id == first.id
    others = [
        plan(),
        plan(warm=WARM.model_copy(update={"shrink": 1.0})),
        plan(warm=WARM, config=CONFIG.model_copy(update={"seed": 1})),
    ]
    assert len({first.id, *(p.id for p in others)}) == 4
    advised = WARM.model_copy(update={"because": {"use": True}})
    assert plan(warm=advised).id == first.id


def test_a_plan_edited_into_nonsense_is_refused_with_all_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    table = json.loads(plan(warm=WARM).model_dump_json())
    table["config"]["d_modle"] = 48
    table["config"]["lr"] = -1
    table["tokens"] = "many"
    table["warm"]["method"] = "magic"
    table["curve"]["low"] = [9.0, 9.0]
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="is not a plan that can be launched") as refused:
        read_plan(path)
    for where in ("config.d_modle", "config.lr", "tokens", "warm.method", "curve"):
        assert f"\n  {where}" in str(refused.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_plan(path)
    with pytest.raises(ValueError, match="no plan"):
        read_plan(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("where", "key"),
    [("because", "loss_interval"), ("because", "N"), ("because", "loss"), ("curve", "tokens"), ("", "tokens")],
)
def test_a_plan_with_a_number_beyond_any_float_is_refused(where: str, key: str, tmp_path: Path) -> None:
    table = json.loads(plan(warm=WARM).model_dump_json())
    inner = table[where] if where else table
    inner[key] = [10**400, *inner[key][1:]] if isinstance(inner[key], list) else 10**400
    (tmp_path / "plan.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="is not a plan that can be launched"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": 8192}, "its loss is for N .*, D 4,096, but the run has N .*, D 8,192"),
        ({"rates": {"hidden": 1.0}}, "they follow from config.lr"),
        ({"config": None}, "needed exactly one of them"),
        ({"ranks": 2}, "needed ddp or fsdp2 for 2 processes"),
        ({"because": {"lr": 1.0}}, "got one without N, D, loss"),
        (
            {"config": None, "command": "t --lr {lr}", "values": {"lr": 1, "tokens": TOKENS}, "warm": WARM},
            "no warm start",
        ),
        ({"config": None, "command": "t --lr {rate}", "values": {"tokens": TOKENS}}, "needed a value for {rate}"),
        (
            {"config": None, "command": "t", "values": {"tokens": 1}},
            "values.tokens: needed 4096, as tokens says, got 1",
        ),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan(**changes)


def test_all_reasons_against_a_launch_are_named_at_once_and_nothing_is_written(text: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"corpus": str(text), "warmup_tokens": 4000})
    bad = plan(config=config, warm=WARM, data_sha256="f" * 64, ranks=3, engine="ddp")
    folder = tmp_path / "study" / "target"
    with pytest.raises(ValueError, match="this cannot be launched") as refused:
        check_launch(bad, folder, bad.arms)
    message = str(refused.value)
    assert "tokens: needed at least 5,040 tokens" in message
    assert "needed a multiple of the 3 processes, got 4: take 3 or 6" in message
    assert "warm.checkpoint: no gone.pt: name another, or launch with --arms scratch" in message
    assert "its text has changed since the plan was made (sha256 ffffffffffff then" in message
    assert not folder.exists()
    with pytest.raises(ValueError, match="has no proxy to start from"):
        check_launch(plan(config=config), folder, ["warm"])


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = plan(config=CONFIG.model_copy(update={"corpus": str(text)}))
    check_launch(good, tmp_path / "new", good.arms)
    with pytest.raises(ValueError, match="needed a folder that can be written, got /proc"):
        check_launch(good, Path("/proc/none"), good.arms)
    needed = estimate_disk_bytes(CONFIG)
    state = 4 * CONFIG.counts.total * 3
    assert needed == state + 4 * CONFIG.counts.total + 4 * state, "trunk, annealed, and the kept state twice"
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 1})())
    with pytest.raises(ValueError, match=r"GB of disk for the checkpoints of 1 arms, got 0\.0 GB"):
        check_launch(good, tmp_path, good.arms)
    (tmp_path / "scratch.pt").touch()
    # An arm that has begun has its disk space already.
    check_launch(good, tmp_path, good.arms)


def test_a_recommendation_older_than_its_runs_is_refused_and_a_launched_target_makes_none_older() -> None:
    rows = [
        (n, d, lr, b, 2 + 40 / n**0.5 + 300 / d**0.5 + 0.02 * math.log(lr / 0.01) ** 2)
        for n in (1e4, 4e4)
        for d in (1e5, 4e5)
        for lr in (0.003, 0.01, 0.03)
        for b in (256.0, 1024.0)
    ]
    runs = check_runs(pd.DataFrame(rows, columns=["N", "D", "lr", "batch_tokens", "loss"]).assign(role="proxy"))
    answer = json.loads(json.dumps(recommend(runs, N=1.6e5, D=1.6e6).to_dict()))
    assert describe_staleness(answer, runs.sample(frac=1, random_state=1), "s") is None
    target = runs.head(1).assign(N=1.6e5, role="target", arm="scratch", excluded="")
    assert describe_staleness(answer, pd.concat([runs, target]), "s") is None
    lost = runs.head(1).assign(loss=math.nan, excluded="diverged")
    assert describe_staleness(answer, pd.concat([runs, lost]), "s") is None
    newer = describe_staleness(answer, pd.concat([runs, runs.head(1).assign(loss=2.5)]), "s")
    assert newer is not None
    assert "made from other runs than the study has now: run `scaling recommend s --target` again" in newer
    del answer["provenance"]["table_sha256"]
    assert "does not say which runs" in (describe_staleness(answer, runs, "s") or "")
    assert hash_table(runs) != hash_table(runs.assign(loss=runs["loss"] + 1e-12))


def test_a_target_from_scratch_teaches_the_next_fit_and_a_warm_one_does_not() -> None:
    rows = [(n, d, 2 + 40 / n**0.5 + 300 / d**0.5) for n in (1e4, 2e4, 4e4) for d in (1e5, 2e5, 4e5)]
    proxies = pd.DataFrame(rows, columns=["N", "D", "loss"]).assign(lr=0.01, batch_tokens=512.0, role="proxy")
    before = recommend(check_runs(proxies), N=6e5, D=4e6)
    target_loss = recommend(check_runs(proxies), N=3e5, D=2e6).loss * 1.03
    target = pd.DataFrame([(3e5, 2e6, target_loss)], columns=["N", "D", "loss"]).assign(
        lr=0.01, batch_tokens=512.0, role="target"
    )
    after = {
        arm: recommend(check_runs(pd.concat([proxies, target.assign(arm=arm)], ignore_index=True)), N=6e5, D=4e6)
        for arm in ("scratch", "warm")
    }
    assert after["warm"].loss == before.loss
    assert before.loss < after["scratch"].loss < before.loss * 1.06
    (low, high), (below, above) = before.loss_interval, after["scratch"].loss_interval
    assert above / below < high / low
    assert after["scratch"].provenance["n_runs"] == before.provenance["n_runs"] + 1


def test_commands_are_plain_python_alone_and_torchrun_together(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    (alone,) = build_commands(plan(), path, "scratch")
    assert alone[1:] == ["-m", "proxies", "launch", str(path), "--only", "scratch"]
    (both,) = build_commands(apply_options(plan(), 2, None, "ddp", 1), path, "scratch", uri="http://h:5000")
    assert both[1:8] == ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    assert both[-2:] == ["--tracking-uri", "http://h:5000"]
    nodes = build_commands(apply_options(plan(), 8, 2, "fsdp2", None), path, "warm")
    assert len(nodes) == 2
    assert nodes[0] == nodes[1]
    assert nodes[0][:2] == ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"], "or a restart looks for ranks that are dead"
    assert nodes[0][nodes[0].index("--rdzv-endpoint") + 1] == "HOST:PORT"
    lines = format_commands(apply_options(plan(), 8, 2, "fsdp2", None), path, ["scratch"]).splitlines()
    assert sum("torch.distributed.run" in line for line in lines) == 2
    assert lines[-1].startswith("# after the last: proxies launch ")


def test_the_engine_follows_the_number_of_processes() -> None:
    assert apply_options(plan(), None, None, None, None).engine == "plain"
    assert apply_options(plan(), 2, None, None, None).engine in ("ddp", "fsdp2")
    assert apply_options(apply_options(plan(), 2, None, "ddp", None), 1, None, None, None).engine == "plain"
    with pytest.raises(ValueError, match="needed ddp or fsdp2"):
        apply_options(plan(), 2, None, "plain", None)


def test_each_excursion_is_reported_once_and_the_first_is_kept() -> None:
    monitor = BandMonitor(BAND, TOKENS)
    losses = [(256, 9.0), (512, 4.4), (724, 5.0), (1024, 6.0), (1448, 3.2), (2048, math.nan), (3000, 9.0)]
    excursions = [monitor.check(point(tokens, loss)) for tokens, loss in losses]
    assert [excursion is not None for excursion in excursions] == [False, False, True, False, False, True, False]
    assert excursions[2] is not None
    assert (excursions[2].tokens, excursions[2].loss, excursions[2].share) == (724, 5.0, 724 / TOKENS)
    assert monitor.first is excursions[2]
    assert json.loads(excursions[2].tag)["tokens"] == 724
    assert monitor.check(point(1024, 99.0, final=True)) is None, "the end is scored, not monitored"
    assert BandMonitor(None, TOKENS).check(point(1024, 99.0)) is None


def test_the_warning_names_tokens_loss_band_and_what_to_look_at() -> None:
    high = format_excursion("target-scratch-1", Excursion(724, 5.0, 3.2, 4.2, 0.177), 0.95)
    assert high.startswith(
        "WARNING: target-scratch-1 has left its 95 % band at 724 tokens (18 % of the run): "
        "loss 5.0000, above (3.2000, 4.2000)"
    )
    assert "learning rate" in high
    assert "below (3.2000, 4.2000)" in format_excursion("t", Excursion(724, 3.0, 3.2, 4.2, 0.1), 0.95)
    assert "above" in format_excursion("t", Excursion(724, math.nan, 3.2, 4.2, 0.1), 0.95)


def test_a_warm_start_may_be_as_good_as_all_tokens_of_both_and_no_worse_than_scratch() -> None:
    law, made = BECAUSE["loss_law"], plan(warm=WARM.model_copy(update={"tokens": 2e6}))
    assert predict_band(made, "scratch") == BAND
    warm = predict_band(made, "warm")
    assert warm is not None
    assert warm.high == BAND.high
    best = law["E"] + law["A"] / made.N**0.5 + law["B"] / (512 + 2e6) ** 0.5
    assert warm.low[0] == pytest.approx(best * 3.5 / 4.0)
    assert BandMonitor(warm, TOKENS).check(point(512, 1.5)) is None
    assert BandMonitor(BAND, TOKENS).check(point(512, 1.5)) is not None


def test_the_score_is_in_sd_of_the_prediction_and_counts_the_proxys_tokens() -> None:
    made = plan(warm=WARM)
    sd = math.log(2.0**2 / 1.8 / 1.8) / 2 / 1.6448536
    excursions: dict[Any, Excursion | None] = {"warm": None, "scratch": Excursion(724, 5.0, 3.2, 4.2, 0.18)}
    curves: dict[Any, tuple[list[float], list[float]]] = {
        "warm": ([500.0, 1000.0, 2000.0], [3.5, 3.0, 2.5]),
        "scratch": ([500.0, 1000.0, 2000.0], [5.0, 4.0, 3.0]),
    }
    outcome = score_arms(made, {"warm": 1.7, "scratch": 2.0 * math.exp(sd)}, curves, excursions)
    assert outcome["scratch, sd from the prediction"] == 1.0
    assert outcome["scratch in the predicted interval"] is True
    assert outcome["warm in the predicted interval"] is False
    assert outcome["warm left its band"] == "never"
    assert outcome["scratch left its band"] == "at 724 tokens, loss 5.0000"
    assert outcome["speed-up in tokens"] == 2.0
    with_base = round(2000 / (1000 + 4000 * 2000 / CONFIG.counts.N), 2)
    assert outcome["speed-up when the proxy's own training is paid, too"] == with_base
    lost = score_arms(replace_warm(made), {"scratch": math.nan}, {"scratch": ([], [])}, {"scratch": None})
    assert lost["loss at 4,096 tokens, scratch"] == "diverged"
    assert lost["scratch in the predicted interval"] is False


def replace_warm(made: LaunchPlan) -> LaunchPlan:
    return made.model_copy(update={"warm": None})


def test_the_result_of_an_arm_comes_back_from_its_file(tmp_path: Path) -> None:
    result = ArmResult(2.0, TOKENS, 12.5, Excursion(724, 5.0, 3.2, 4.2, 0.18))
    result.write(tmp_path, "warm")
    assert ArmResult.read(tmp_path, "warm") == result
    replace(result, loss=None, left=None).write(tmp_path, "scratch")
    assert ArmResult.read(tmp_path, "scratch") == ArmResult(None, TOKENS, 12.5, None)
    assert ArmResult.read(tmp_path / "none", "warm") is None


def test_the_newest_growth_plan_for_this_width_is_shown_and_does_not_decide(tmp_path: Path) -> None:
    gain = {"value": -0.012, "low": -0.02, "high": -0.004}
    at = {"horizon": 20.0, "gain": gain, "gain_with_base": gain}

    def write_decision(name: str, width: int, use: bool) -> None:
        (tmp_path / "s" / name).mkdir(parents=True)
        arms = [{"name": "duplicate", "at": []}, {"name": "shrink-pad-perturb", "at": [at]}]
        answer = {"use": use, "method": "shrink-pad-perturb", "settings": {"lr": 0.01, "shrink": 0.4}}
        answer |= {"decision": {"arms": arms}, "because": {"question": {"real": {"target": width}}}}
        (tmp_path / "s" / name / "decision.json").write_text(json.dumps(answer))

    write_decision("growth-1", CONFIG.d_model, False)
    write_decision("growth-2", 2 * CONFIG.d_model, True)
    warm = attach_growth_advice(WARM, tmp_path / "s.toml", CONFIG)
    assert warm is not None
    assert (warm.method, warm.shrink) == (WARM.method, WARM.shrink)
    text = " ".join(str(plan(warm=warm)).split())
    assert (
        "DO NOT USE IT, shrink-pad-perturb (lr 0.01, shrink 0.4); at 20 tokens per parameter "
        "it lowers the loss by -1.2 %, interval -2 to -0.4 %" in text
    )
    assert attach_growth_advice(WARM, tmp_path / "other.toml", CONFIG) == WARM
    assert attach_growth_advice(None, tmp_path / "s.toml", CONFIG) is None
