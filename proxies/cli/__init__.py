"""Commands too long for `proxies/__main__.py`. Imports every other room."""
