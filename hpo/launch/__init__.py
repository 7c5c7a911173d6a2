"""Start and watch workers, here or on a Ray cluster; progress lines and the estimate of what is left. Imports the rooms
`surrogate` to `worker`."""
