"""The longer commands of `hpo`. It may import every other subpackage."""
