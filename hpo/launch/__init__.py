"""Start and watch workers, here or on a Ray cluster, with progress lines and an estimate of the remaining work. It may
import `surrogate` to `worker`.
"""
