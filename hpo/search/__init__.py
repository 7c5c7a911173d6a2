"""Ask, tell, extend: incremental Hyperband, the model-driven search, the view of the trials, and the writer of trials.
It may import `surrogate`, `storage`, `samplers` and `planning`.
"""
