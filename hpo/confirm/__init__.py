"""Repeat the best configurations on fresh random seeds: contenders, runs, statistics, verdict. Imports every other room."""
