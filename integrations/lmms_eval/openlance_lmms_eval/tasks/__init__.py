"""No tasks of our own; lmms-eval looks for this package in every plugin."""
