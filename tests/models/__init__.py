"""Small seeded models for tests: the whole path of a real one, in a second instead of a minute."""
