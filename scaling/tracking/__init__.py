"""The only code that imports MLflow: the client, experiments and runs, logging, the fast reader, the durable recorder.
It may import `common` and `laws`.
"""
