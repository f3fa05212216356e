"""What the command line decides: settings, tables, plans."""
