"""The run table: its columns, checks of cells, the importer, units, and runs read from MLflow. It may import `common`
to `formats`.
"""
