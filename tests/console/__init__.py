"""The console's page: its files, its arithmetic (by node), and the whole in a real Chromium."""
