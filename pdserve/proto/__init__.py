"""Python generated from the ``.proto`` files in ``proto/``; do not edit, run ``make proto``."""
