"""What is learned: a task's targets, loss, metrics and outputs. A new one is a file and a row of TASKS (table.py)."""
