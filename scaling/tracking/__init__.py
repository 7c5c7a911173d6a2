"""The only code that imports MLflow: the client, experiments and runs, logging, the fast reader, the durable recorder.

May import the rooms `common` and `laws`.
"""
