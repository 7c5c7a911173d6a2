"""The only code that imports MLflow: the client, experiments and runs, logging, the fast reader, the durable recorder. Imports
`common` and `laws`."""
