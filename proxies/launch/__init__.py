"""The target run: its plan, planner, preflight checks and arms, and the monitor that compares it with its prediction.
It may import everything from `config` to `growth`.
"""
