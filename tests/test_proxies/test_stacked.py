"""Members trained together have the losses of separate runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from proxies.config.proxy import ProxyConfig
from proxies.model import transformer
from proxies.training import run_state
from proxies.training.loop import train
from proxies.training.stacked import train_together, worth_stacking
from scaling.common.measurement import Measurement

TOKENS = 6_000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: Any) -> ProxyConfig:
    small = {
        "d_model": 32,
        "base_width": 32,
        "n_layers": 1,
        "seq_len": 16,
        "batch_seqs": 8,
        "warmup_tokens": 256,
        "eval_windows": 8,
    }
    return ProxyConfig(**(small | changes))


MEMBERS = (
    config(lr=0.004),
    config(lr=0.008, seed=1, weight_decay=0.0, cooldown=0.4),
    config(lr=0.002, seed=2, beta2=0.99, warmup_tokens=512, schedule="cosine"),
)


def train_members(members: tuple[ProxyConfig, ...], **options: Any) -> list[list[Measurement]]:
    points: list[list[Measurement]] = [[] for _ in members]
    for k, point in train_together(members, TOKENS, device="cpu", **options):
        points[k].append(point)
    return points


def check_same_points(ours: list[Measurement], alone: list[Measurement], tolerance: float) -> None:
    """Check that the points are the same, with losses up to `tolerance`."""
    assert [(p.tokens, p.lr, p.final, p.diverged) for p in ours] == [
        (p.tokens, p.lr, p.final, p.diverged) for p in alone
    ]
    for a, b in zip(ours, alone, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=tolerance)
        assert a.train_loss == pytest.approx(b.train_loss, abs=max(tolerance, 1e-6))


def test_members_have_the_losses_of_separate_runs() -> None:
    for ours, member in zip(train_members(MEMBERS), MEMBERS, strict=True):
        alone = list(train(member, TOKENS, device="cpu"))
        assert len(alone) > 3
        check_same_points(ours, alone, 1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "ademamix", "schedule-free"])
def test_in_double_precision_they_agree_to_twelve_digits(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = transformer.build
    monkeypatch.setattr(run_state, "build", lambda c: build(c).double())
    members = tuple(m.model_copy(update={"optimizer": optimizer}) for m in MEMBERS[:2])
    for ours, member in zip(train_members(members), members, strict=True):
        check_same_points(ours, list(train(member, TOKENS, device="cpu")), 1e-11)


def test_a_member_alone_in_its_stack_is_its_run() -> None:
    (ours,) = train_members(MEMBERS[:1])
    check_same_points(ours, list(train(MEMBERS[0], TOKENS, device="cpu")), 1e-5)


def test_a_stopped_member_has_no_more_points_and_the_others_continue() -> None:
    stopped: set[int] = set()
    points: list[list[Measurement]] = [[], [], []]
    for k, point in train_together(MEMBERS, TOKENS, stopped=stopped, device="cpu"):
        points[k].append(point)
        if k == 1 and len(points[1]) == 2:
            stopped.add(1)
    assert len(points[1]) == 2
    assert not points[1][-1].final
    whole = train_members(MEMBERS)
    for k in (0, 2):
        check_same_points(points[k], whole[k], 1e-5)


def test_a_member_that_diverges_reports_it_once_and_the_others_continue() -> None:
    wild = config(lr=1e6)
    ours = train_members((MEMBERS[0], wild, MEMBERS[1]))
    check_same_points(ours[0], list(train(MEMBERS[0], TOKENS, device="cpu")), 1e-5)
    check_same_points(ours[2], list(train(MEMBERS[1], TOKENS, device="cpu")), 1e-5)
    alone = list(train(wild, TOKENS, device="cpu"))
    assert alone[-1].diverged
    assert ours[1][-1].diverged
    assert ours[1][-1].final
    assert math.isnan(ours[1][-1].loss) or ours[1][-1].loss > math.log(256)
    assert sum(p.final for p in ours[1]) == 1


def test_all_stopped_ends_it() -> None:
    assert list(train_together(MEMBERS, TOKENS, stopped={0, 1, 2}, device="cpu")) == []


def test_members_of_another_shape_are_refused_by_name_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="got others in batch_seqs, d_model"):
        train_together((config(), config(d_model=64, batch_seqs=4)), TOKENS)
    # It is part of the forward pass, which all members share.
    with pytest.raises(ValueError, match="got others in alpha_attn"):
        train_together((config(), config(alpha_attn=2.0)), TOKENS)
    with pytest.raises(ValueError, match="got none"):
        train_together((), TOKENS)
    with pytest.raises(ValueError, match="compile and recompute off"):
        train_together((config(recompute=True),), TOKENS)
    with pytest.raises(ValueError, match="needed at least"):
        train_together((config(),), 100)


def test_on_cpu_it_stays_off() -> None:
    assert not worth_stacking(torch.device("cpu"))
    assert worth_stacking(torch.device("cuda"))
