"""Files of other programs, read as tables of plain cells without interpreting them: text with any separator, JSON in
any shape, parquet, sheets of Excel, logs, charts, event files, and folders of these. It may import `scaling.common`."""
