"""Training: the loop, run state, checkpoints, shards, distributed and stacked training, AutoLRS, throughput.

Imports `config`, `data` and `model`.
"""
