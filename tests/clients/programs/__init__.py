"""Run by the clients' own Python: nothing of ours is imported here."""
