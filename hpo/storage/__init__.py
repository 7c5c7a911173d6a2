"""Where a study lives: connections, the journal, locks, leases, retries, and the attributes of a trial. Imports `scaling` only."""
