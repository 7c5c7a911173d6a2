"""The study file, the `Trainer` protocol, a study's folder, creating, opening and deleting a study, and its run in
MLflow. Imports the rooms `surrogate` to `search`."""
