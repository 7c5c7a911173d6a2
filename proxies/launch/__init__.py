"""The target run: plan, planner, preflight checks, arms, and the monitor that compares it with its prediction. Imports the rooms
`config` to `growth`."""
