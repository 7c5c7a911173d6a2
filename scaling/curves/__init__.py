"""Loss along one run: its shape, the forecast for a run in progress and for a planned run, and a backtest of both. It
may import `common` to `runs`.
"""
