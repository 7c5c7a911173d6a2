"""What people read: the HTML page with its figures and tables, and the text of `scaling fit`.
May import every other room.
"""
