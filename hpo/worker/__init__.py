"""One worker of a study: its loop, the training process, one job, stop signals, results, early stopping. It may import
`surrogate` to `study`.
"""
