"""Repeat the best configurations with fresh seeds: contenders, runs, statistics, verdict. Imports every other room."""
