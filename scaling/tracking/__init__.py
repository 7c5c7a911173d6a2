"""The only code that imports MLflow: client, experiments and runs, logging, fast reader, durable recorder.
May import the rooms `common` and `laws`.
"""
