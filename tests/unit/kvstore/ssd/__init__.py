"""The log on a disk, and what goes there."""
