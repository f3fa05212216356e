"""Of the documentation site: what turns facts into pages."""
