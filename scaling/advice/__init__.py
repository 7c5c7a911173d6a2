"""Answers: the recommendation, its flags, and the next run worth doing. May import the rooms `common` to `curves`."""
