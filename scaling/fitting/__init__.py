"""From evidence to a law: Newton's method, the loss law, model averaging, other forms, isoFLOP profiles, the envelope, the law of
learning rate and batch size. Imports `common` and `laws`."""
