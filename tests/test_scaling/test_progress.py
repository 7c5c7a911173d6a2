"""A command that works longer says so within a second, on stderr, and only if somebody can see it."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest
from threadpoolctl import threadpool_info

from scaling.common import logs
from scaling.common.arrays import limit_to_one_thread
from scaling.common.logs import show_progress


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logs, "PATIENCE", 0.05)
    caplog.set_level("INFO", logger="muscale")
    return caplog


def test_slow_work_is_named_once_and_quick_work_is_not(lines: pytest.LogCaptureFixture) -> None:
    with show_progress("fitting laws"):
        pass
    time.sleep(0.15)
    assert lines.messages == []
    with show_progress("fitting laws", steps=2) as advance:
        advance("one")
        time.sleep(0.2)
        advance("two")
    assert lines.messages == ["fitting laws ..."]


def test_nothing_is_shown_when_asked_to_be_quiet(lines: pytest.LogCaptureFixture) -> None:
    with show_progress("fitting laws", quiet=True):
        time.sleep(0.15)
    logging.getLogger("muscale").setLevel(logging.WARNING)
    with show_progress("fitting laws"):
        time.sleep(0.15)
    assert lines.messages == []


def test_on_a_terminal_a_bar_names_the_step_and_disappears(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    logging.getLogger("muscale").setLevel(logging.INFO)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("reading [runs]", steps=2) as advance:
        advance("drawing: rungs")
        time.sleep(0.2)
    assert "reading [runs]" in screen.getvalue()
    assert "drawing: rungs" in screen.getvalue()


def test_fits_use_one_thread() -> None:
    with limit_to_one_thread():
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
