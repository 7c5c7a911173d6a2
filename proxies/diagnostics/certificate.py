"""Write the certificate of a passed coordinate check, which lets an optimizer be used at other widths."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from proxies.config.optimizer_gate import MEASURED_FIELDS, get_certified_settings
from proxies.config.proxy import ProxyConfig

if TYPE_CHECKING:
    from proxies.diagnostics.coord_check import CoordCheck


def write_certificate(path: Path, config: ProxyConfig, check: CoordCheck) -> None:
    """Write the outcome of a coordinate check of `config`, passed or not, whole or not at all."""
    measured = {name: check.json[name] for name in MEASURED_FIELDS}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(get_certified_settings(config) | measured, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
