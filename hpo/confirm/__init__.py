"""Repeat the best configurations on fresh seeds: contenders, runs, statistics, verdict. Imports every other room."""
