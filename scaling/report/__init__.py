"""What people read: the HTML page with its figures and tables, and the text of `scaling fit`. It may import every
other subpackage.
"""
