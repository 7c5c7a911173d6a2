"""The coordinate check, learning-rate transfer, and their figures. It may import `config` to `training`."""
