"""What every room may use: the shared parts of the command lines, redaction, quantities such as "7B", `Measurement`, atomic file
writes. Imports no other room, and no pandas."""
