"""Training: the loop, run state, checkpoints, shards, distributed and stacked training, AutoLRS, throughput. It may
import `config`, `data` and `model`.
"""
