"""One worker: its loop, the training process, one job, signals, results, early stopping. Imports the rooms `surrogate` to `study`."""
