"""The coordinate check, learning-rate transfer, and their figures. Imports the rooms `config` to `training`."""
