"""The study file, the `Trainer` protocol, a study's folder, creating, opening and deleting a study, and its run in
MLflow. It may import `surrogate` to `search`.
"""
