"""Which worker gets which GPU. It is decided by the environment alone, so no GPU is needed to test it."""

from __future__ import annotations

import pytest

from hpo.launch.launcher import assign_gpus, list_visible_gpus


def test_each_worker_has_a_gpu_of_its_own_unless_there_are_fewer_gpus() -> None:
    assert assign_gpus(3, []) == [{}, {}, {}]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in assign_gpus(2, ["0", "1", "2"])] == ["0", "1"]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in assign_gpus(5, ["3", "GPU-ab"])] == ["3", "GPU-ab", "3", "GPU-ab", "3"]


def test_only_the_gpus_that_the_user_makes_visible_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, gpus in (("", []), ("-1", []), ("2", ["2"]), (" 0, GPU-ab ,MIG-1", ["0", "GPU-ab", "MIG-1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert list_visible_gpus() == gpus
