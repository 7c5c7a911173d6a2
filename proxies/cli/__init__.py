"""Commands that are too long for `proxies/__main__.py`. It may import everything else in `proxies`."""
