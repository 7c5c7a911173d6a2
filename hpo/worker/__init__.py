"""One worker of a study: its loop, the training process, one job, stop signals, results, early stopping. Imports the
rooms `surrogate` to `study`."""
