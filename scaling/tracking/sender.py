"""Send spooled records to MLflow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from scaling.common.redact import redact_passwords
from scaling.tracking.client import connect, default_uri, fail_fast, import_mlflow, is_refusal
from scaling.tracking.experiment import (
    delete_empty_duplicates,
    find_or_create_study_run,
    prepare_child_run,
    set_run_status,
)
from scaling.tracking.log import log_records
from scaling.tracking.spool import (
    SpoolHead,
    SpoolRecord,
    count_unsent,
    get_lock,
    get_position_path,
    get_refused_path,
    list_spool_files,
    parse_head,
    read_batch,
    read_position,
    release_lock,
    save_refused,
    summarize_error,
    write_position,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("muscale.scaling")

# Lines in a request, of at most 3 metrics each. MLflow takes 1000 metrics.
MAX_BATCH_LINES = 200
# Seconds until a request is given up: the timeout doubles after each failure, because a slow server is not an absent
# one.
FIRST_TIMEOUT_SECONDS, LONGEST_TIMEOUT_SECONDS = 10.0, 120.0
# How long the end of a run waits for an MLflow that gives no sign of life.
CLOSE_SECONDS = 10.0


def send_spooled_records(folder: Path, uri: str | None = None) -> int:
    """Send the records that Recorders left in a folder.

    An MLflow that does not take them is logged, not raised.

    Args:
        folder: The folder of the spool files.
        uri: The store's tracking URI; by default `scaling.tracking.client.default_uri()`.

    Returns:
        How many records are still not in MLflow.
    """
    sender = SpoolSender(uri or default_uri())
    try:
        for path in list_spool_files(folder):
            send_leftover_file(sender, path)
    except Exception as error:
        logger.warning(f"records wait in {folder}, because MLflow does not take them: {summarize_error(error)}")
    return sum(count_unsent(path) for path in list_spool_files(folder))


class SpoolSender:
    """A connection to MLflow, opened when it is first needed, and the runs that were found or created there.

    Attributes:
        uri: The store's tracking URI.
        runs: (id of the parent run, id of the run) of each spool file.
        missing_params: The parameters that are still to be sent with the first records of a spool file.
        positions: How many bytes of each spool file MLflow has.
        last_progress: When MLflow last took something, by `time.monotonic`.
        timeout: Seconds until a request is given up.
        batch_lines: Lines of the next request. Fewer after a failure, in case a slow server takes too long over so
            many.
        may_have_duplicates: Whether a request to create a run failed, which the server may have carried out all the
            same.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.runs: dict[Path, tuple[str, str]] = {}
        self.missing_params: dict[Path, dict[str, str]] = {}
        self.positions: dict[Path, int] = {}
        self.last_progress = 0.0
        self.timeout = FIRST_TIMEOUT_SECONDS
        self.batch_lines = MAX_BATCH_LINES
        self.may_have_duplicates = False
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, connected at the first use."""
        if self._client is None:
            # The import takes seconds that are not the server's fault.
            import_mlflow()
            self.last_progress = time.monotonic()
            self._client = _connect_once(self.uri)
            self.last_progress = time.monotonic()
        return self._client

    def send(self, path: Path) -> Iterator[int]:
        """Send the whole lines of a spool file, from where the last call stopped.

        Args:
            path: The spool file.

        Yields:
            The number of lines in each batch that MLflow has taken.

        Raises:
            Exception: Whatever MLflow or the network raises. A later call continues after the last batch.
        """
        with path.open("r+b") as file, fail_fast(self.timeout):
            os.fsync(file.fileno())
            first_line = file.readline()
            if not first_line.endswith(b"\n"):
                return
            position = self.positions.get(path) or read_position(path)
            if path not in self.runs:
                head = parse_head(first_line)
                if head is None:
                    logger.warning(
                        f"{path}: its first line does not name a run, so it is kept as {get_refused_path(path)}"
                    )
                    path.rename(get_refused_path(path))
                    return
                self.runs[path], self.missing_params[path] = self._find_or_create_run(
                    head, path.parent, reopen=not position
                )
            _, run_id = self.runs[path]
            # The first batch counts the head, too, and is sent even without records, for the parameters.
            unsent_heads = int(not position)
            file.seek(position or len(first_line))
            while (records := read_batch(file, self.batch_lines, path)) or unsent_heads:
                self.batch_lines = max(1, self.batch_lines // 2)
                self._send_batch(run_id, records, path)
                self.batch_lines = min(MAX_BATCH_LINES, 4 * self.batch_lines)
                self._save_position(path, file.tell())
                yield unsent_heads + len(records)
                unsent_heads = 0

    def _save_position(self, path: Path, position: int) -> None:
        """Keep how much of a file MLflow has: on a full disk only in memory, since sending twice does no harm."""
        self.positions[path] = position
        self.last_progress = time.monotonic()
        try:
            write_position(path, position)
        except OSError as error:
            logger.warning(f"{get_position_path(path)}: cannot be written: {error}")

    def clean_up(self, path: Path) -> None:
        """Remove a spool file that has been sent, and the empty runs that a server created for abandoned requests."""
        if self.may_have_duplicates and path in self.runs:
            with fail_fast():
                delete_empty_duplicates(self.client, *self.runs[path])
        for file in (path, get_position_path(path)):
            file.unlink(missing_ok=True)

    def _find_or_create_run(
        self, head: SpoolHead, folder: Path, *, reopen: bool
    ) -> tuple[tuple[str, str], dict[str, str]]:
        """Return (id of the parent run, id of the run), and the parameters that the run lacks."""
        # Connect before taking the lock: import and connection take seconds, for which no other process should wait.
        client = self.client
        try:
            # Without the lock, two arms of one study would create the study's run twice.
            with FileLock(folder / ".spool.lock", timeout=CLOSE_SECONDS):
                parent = find_or_create_study_run(client, head["study"])
                run_id, missing = prepare_child_run(
                    client,
                    parent,
                    head["name"],
                    head["role"],
                    head["params"],
                    commit=head["commit"],
                    began=head["at"],
                    reopen=reopen,
                )
                return (parent, run_id), missing
        except Exception:
            self.may_have_duplicates = True
            raise

    def _send_batch(self, run_id: str, records: list[SpoolRecord], path: Path) -> None:
        """Send one batch; if MLflow refuses it, send each record by itself and keep the refused ones in a file.

        Refused parameters are not the fault of any record, so they raise as long as they have not been sent.
        """
        params = self.missing_params.get(path, {})
        metrics = [(r["metrics"], r["step"], r["at"]) for r in records if "metrics" in r]
        tags = {name: value for r in records for name, value in r.get("tags", {}).items()}
        try:
            log_records(self.client, run_id, metrics, tags, params)
        except Exception as error:
            if not is_refusal(error):
                raise
            if params:
                log_records(self.client, run_id, [], {}, params)
                del self.missing_params[path]
                self._send_batch(run_id, records, path)
                return
            if len(records) == 1:
                logger.warning(
                    f"MLflow refuses a record, which is kept in {get_refused_path(path)}: {summarize_error(error)}"
                )
                save_refused(path, {**records[0], "refused": redact_passwords(error)})
                return
            for record in records:
                self._send_batch(run_id, [record], path)
            return
        self.missing_params.pop(path, None)
        ends = [r for r in records if "status" in r]
        if ends:
            set_run_status(self.client, run_id, status=ends[-1]["status"], at=ends[-1]["at"])


def send_leftover_file(sender: SpoolSender, path: Path, *, before: str | None = None) -> None:
    """Send and remove the spool file of a process that has ended; skip a file that another process holds.

    Args:
        sender: The connection.
        path: The spool file.
        before: The name of the run whose own, later records are waiting.

    Raises:
        RuntimeError: If another process holds the file and its records are of the run `before`: they must arrive first.
        Exception: Whatever MLflow or the network raises.
    """
    lock = get_lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as timeout:
        with path.open("rb") as file:
            first_line = file.readline()
        head = parse_head(first_line) if first_line.endswith(b"\n") else None
        if before is not None and head is not None and head["name"] == before:
            raise RuntimeError(f"another process holds earlier records of {before}, {path}") from timeout
        return
    try:
        if path.exists():
            for _ in sender.send(path):
                pass
            if not path.exists():
                return
            if read_position(path) < path.stat().st_size:
                logger.warning(f"{path}: its last line was cut off when its writer was killed, and is skipped")
            sender.clean_up(path)
    finally:
        release_lock(lock, path)


@cache
def _connect_once(uri: str) -> MlflowClient:
    return connect(uri)
