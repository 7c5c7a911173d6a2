"""Commands that are too long for `proxies/__main__.py`. Imports all other rooms."""
