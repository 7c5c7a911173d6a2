"""What one test leaves in the process must not be another's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scaling.tracking import recorder


@pytest.fixture(autouse=True)
def _no_commit_of_another_folder() -> Iterator[None]:
    """Records name the commit of the folder that a process began in, once found; tests change the folder."""
    recorder.read_git_commit_once.cache_clear()
    yield
    recorder.read_git_commit_once.cache_clear()
