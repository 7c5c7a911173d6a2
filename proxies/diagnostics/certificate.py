"""Write the certificate of a passed coordinate check, which lets an optimizer be used at other widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from proxies.config.optimizer_gate import MEASURED_FIELDS, get_certified_settings
from proxies.config.proxy import ProxyConfig
from scaling.common.atomic import write_atomically

if TYPE_CHECKING:
    from proxies.diagnostics.coord_check import CoordCheck


def write_certificate(path: Path, config: ProxyConfig, check: CoordCheck) -> None:
    """Write the outcome of a coordinate check, passed or not.

    Args:
        path: The file to write.
        config: The proxy that was checked.
        check: The outcome.

    Raises:
        OSError: If the file cannot be written.
    """
    measured = {name: check.json[name] for name in MEASURED_FIELDS}
    write_atomically(path, json.dumps(get_certified_settings(config) | measured, indent=1) + "\n")
