"""Answers: the recommendation, its warning flags, and the next run worth doing. It may import `common` to `curves`."""
