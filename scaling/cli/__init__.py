"""The commands that are too long for `scaling.__main__`. It may import every other subpackage."""
