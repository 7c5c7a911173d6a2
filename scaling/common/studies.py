"""Find a study by its name or the path of its file."""

from __future__ import annotations

from pathlib import Path

from scaling.common.suggest import did_you_mean

# Relative to the working directory: a project is the folder in which its commands run.
STUDIES = Path("studies")


def find_study_file(study: str) -> Path:
    """Return the path of a study file.

    Args:
        study: A path that ends in .toml, or the name of a study in `studies/`.

    Returns:
        The path itself, or studies/NAME.toml.

    Raises:
        ValueError: If there is no such file. The message names the most similar study, or lists those that exist.
    """
    path = Path(study)
    if path.suffix != ".toml":
        path = STUDIES / f"{study}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = did_you_mean(path.stem, known, cutoff=0.3) or f"studies there: {', '.join(known) or 'none'}"
        raise ValueError(f"no study file {path}; {hint}")
    return path
