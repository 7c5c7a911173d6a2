"""The run table: its columns, checks of cells, file readers, the importer, units, and runs read from MLflow.
May import the rooms `common` to `fitting`.
"""
