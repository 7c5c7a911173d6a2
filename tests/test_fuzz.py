"""A few hundred damaged files for every reader; benchmarks/fuzz.py runs as many as you like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import NAMES, Crash, draw_input, try_input
from benchmarks.fuzz_targets import Kind, make_targets

INPUTS = {"study": 200, "runs": 200, "journal": 200, "checkpoint": 120}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=NAMES, scope="module")
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, list[Kind]]]:
    """Yield one target with what it needs; functions that it replaces are restored afterwards."""
    from hpo.study.schema import TrainerTable
    from scaling.tracking import sender

    find, before = TrainerTable.find, dict(vars(sender))
    yield request.param, make_targets(request.param, tmp_path_factory.mktemp(request.param))
    TrainerTable.find = find  # type: ignore[method-assign]
    vars(sender).update(before)


def test_valid_files_are_read_and_damaged_ones_read_or_refused_by_name(
    target: tuple[str, list[Kind]], tmp_path: Path
) -> None:
    name, kinds = target
    for kind in kinds:
        assert [try_input(kind, data, tmp_path / "here") for data in kind.seeds] == ["read"] * len(kind.seeds)
    results = Counter(try_input(*draw_input(kinds, 7, i), tmp_path / "here") for i in range(INPUTS[name]))
    # Otherwise the changes would be so coarse that they only test the first check.
    assert results["read"] >= 1
    assert results.total() - results["read"] > INPUTS[name] / 4


def test_any_bytes_at_all_are_refused(target: tuple[str, list[Kind]], tmp_path: Path) -> None:
    """Not only inputs near a valid file: what has no header, no columns and no checksum cannot be read."""
    _, kinds = target

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from(kinds),
        st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda t: t.encode(errors="replace"))),
    )
    def check(kind: Kind, data: bytes) -> None:
        assert try_input(kind, data, tmp_path / "here") != "read" or kind.name in (
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
    try_input(kind, json.dumps([value] if not isinstance(value, list) else value).encode(), tmp_path / "here")


def test_a_reader_that_crashes_is_distinguished_from_one_that_refuses(tmp_path: Path) -> None:
    """Test the judge: a KeyError, a refusal that names no file, and one that does."""

    def make_raising(error: Exception) -> Kind:
        def read(data: bytes, here: Path) -> None:
            raise error

        return Kind("fake", (), read)

    for error in (KeyError("x"), ValueError("bad"), OSError(22, "Invalid"), MemoryError(), RecursionError("deep")):
        with pytest.raises(Crash):
            try_input(make_raising(error), b"", tmp_path / "here")
    assert try_input(make_raising(ValueError(f"{tmp_path}/here/x is bad")), b"", tmp_path / "here") == "ValueError"
    assert try_input(Kind("fake", (), lambda *_: None), b"", tmp_path / "here") == "read"


def test_an_input_of_a_seed_is_always_the_same_and_seeds_differ() -> None:
    kinds = [Kind("a", (b"some text 123\n" * 9,), lambda *_: None), Kind("b", (b"{}", b"[1]"), lambda *_: None)]
    first = [draw_input(kinds, 1, i) for i in range(50)]
    assert [draw_input(kinds, 1, i) for i in range(50)] == first
    assert [draw_input(kinds, 2, i) for i in range(50)] != first
    assert len({data for _, data in first}) > 40
