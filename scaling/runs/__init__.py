"""The run table: its columns, checks of cells, file readers, the importer, units, and runs read from MLflow. It may
import `common` to `fitting`.
"""
