"""What serves this repository alone: run as `python3 -m tools.<name>` in its root. Not in the wheel."""
