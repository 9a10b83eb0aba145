"""Scripts; `python -m experiments` shares what they show progress by."""
