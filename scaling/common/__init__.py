"""What every subpackage may use: logging, signals, atomic writes, redaction, quantities such as "7B", `Measurement`.
It imports no other subpackage, and no pandas.
"""
