"""Commands that are too long for `proxies/__main__.py`. It may import every other subpackage."""
