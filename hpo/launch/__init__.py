"""Start and watch workers, here or on a Ray cluster, with progress and an estimate of what is left. Imports the rooms
`surrogate` to `worker`."""
