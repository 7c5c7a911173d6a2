"""Fit laws to runs: Newton's method, the loss law, averaged forms, other forms, isoFLOP profiles, the envelope, and the
law of learning rate and batch size. Imports `common` and `laws`."""
