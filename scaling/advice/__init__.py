"""Answers: the recommendation, its warning flags, and the next run worth doing. Imports the rooms `common` to `curves`."""
