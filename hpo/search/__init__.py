"""Ask, tell, extend: incremental Hyperband, the model-driven search, the view of the trials, and the writer of trials.
Imports `surrogate`, `storage` and `samplers`."""
