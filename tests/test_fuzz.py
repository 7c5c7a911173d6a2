"""A few hundred damaged files for every reader; benchmarks/fuzz.py runs as many as wanted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import NAMES, Crash, drawn, outcome
from benchmarks.fuzz_targets import Kind, targets

INPUTS = {"study": 200, "runs": 200, "journal": 200, "checkpoint": 120}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=NAMES, scope="module")
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, list[Kind]]]:
    """One target with what it needs; what it puts in place of other parts is taken back."""
    from hpo.study import config
    from hpo.study.schema import TrainerTable
    from scaling.tracking import sender

    find, before = TrainerTable.find, [(module, dict(vars(module))) for module in (config, sender)]
    yield request.param, targets(request.param, tmp_path_factory.mktemp(request.param))
    TrainerTable.find = find  # type: ignore[method-assign]
    for module, names in before:
        vars(module).update(names)


def test_whole_files_are_read_and_damaged_ones_read_or_refused_by_name(
    target: tuple[str, list[Kind]], tmp_path: Path
) -> None:
    name, kinds = target
    for kind in kinds:
        assert [outcome(kind, data, tmp_path / "here") for data in kind.seeds] == ["read"] * len(kind.seeds)
    found = Counter(outcome(*drawn(kinds, 7, i), tmp_path / "here") for i in range(INPUTS[name]))
    assert found["read"] >= 1  # or the changes would be so coarse that they test only the first check
    assert found.total() - found["read"] > INPUTS[name] / 4


def test_any_bytes_at_all_are_refused(target: tuple[str, list[Kind]], tmp_path: Path) -> None:
    """Not only what is near a whole file; what has no head, no columns and no checksum cannot be read."""
    _, kinds = target

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from(kinds),
        st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda t: t.encode(errors="replace"))),
    )
    def check(kind: Kind, data: bytes) -> None:
        assert outcome(kind, data, tmp_path / "here") != "read" or kind.name in (
            "records",
            "journal",
            "ladders",
            "mapping",
            "csv",
            "jsonl",
        )

    check()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
        lambda t: (
            st.lists(t, max_size=4)
            | st.dictionaries(st.sampled_from(["N", "D", "loss", "config", "summary", "value"]), t, max_size=4)
        ),
    )
)
def test_json_of_any_shape_is_a_table_or_refused_by_name(tmp_path: Path, value: object) -> None:
    from scaling.runs.io import load_runs

    def read(data: bytes, here: Path) -> None:
        (here / "x.json").write_bytes(data)
        load_runs(here / "x.json")

    kind = Kind("json", (), read)
    outcome(kind, json.dumps([value] if not isinstance(value, list) else value).encode(), tmp_path / "here")


def test_a_reader_that_crashes_is_told_from_one_that_refuses(tmp_path: Path) -> None:
    """The judge itself: a KeyError, a refusal that names nothing, and one that does."""

    def raising(error: Exception) -> Kind:
        def read(data: bytes, here: Path) -> None:
            raise error

        return Kind("fake", (), read)

    for error in (KeyError("x"), ValueError("bad"), OSError(22, "Invalid"), MemoryError(), RecursionError("deep")):
        with pytest.raises(Crash):
            outcome(raising(error), b"", tmp_path / "here")
    assert outcome(raising(ValueError(f"{tmp_path}/here/x is bad")), b"", tmp_path / "here") == "ValueError"
    assert outcome(Kind("fake", (), lambda *_: None), b"", tmp_path / "here") == "read"


def test_an_input_of_a_seed_is_always_the_same_and_seeds_differ() -> None:
    kinds = [Kind("a", (b"some text 123\n" * 9,), lambda *_: None), Kind("b", (b"{}", b"[1]"), lambda *_: None)]
    first = [drawn(kinds, 1, i) for i in range(50)]
    assert [drawn(kinds, 1, i) for i in range(50)] == first
    assert [drawn(kinds, 2, i) for i in range(50)] != first
    assert len({data for _, data in first}) > 40
