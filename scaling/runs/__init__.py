"""The run table: its columns, cell checks, file readers, the importer, units, and runs read from MLflow. Imports the rooms
`common` to `fitting`."""
