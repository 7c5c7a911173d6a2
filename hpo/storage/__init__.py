"""Where a study is stored: connections, the journal, locks, leases, retries, and the user attributes of a trial. It
imports `scaling` only.
"""
