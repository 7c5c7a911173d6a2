"""The target run: its plan, planner, preflight checks and arms, and the monitor that compares it with its prediction.

Imports the rooms `config` to `growth`.
"""
