"""Ask, tell, extend: incremental Hyperband, the model-driven search, the view of the trials and what is written to them. Imports
`surrogate`, `storage` and `samplers`."""
