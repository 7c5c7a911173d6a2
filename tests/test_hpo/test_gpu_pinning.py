"""Which worker gets which GPU: by the environment alone, so that no device is needed to know it."""

from __future__ import annotations

import pytest

from hpo.launch.launcher import assign_gpus, list_visible_gpus


def test_each_worker_has_a_gpu_of_its_own_and_shares_only_when_there_are_fewer() -> None:
    assert assign_gpus(3, []) == [{}, {}, {}]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in assign_gpus(2, ["0", "1", "2"])] == ["0", "1"]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in assign_gpus(5, ["3", "GPU-ab"])] == ["3", "GPU-ab", "3", "GPU-ab", "3"]


def test_gpus_are_those_that_the_user_lets_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, gpus in (("", []), ("-1", []), ("2", ["2"]), (" 0, GPU-ab ,MIG-1", ["0", "GPU-ab", "MIG-1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert list_visible_gpus() == gpus
