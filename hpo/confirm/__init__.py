"""Repeat the best configurations with fresh seeds: contenders, runs, statistics, verdict. It may import every other
subpackage.
"""
