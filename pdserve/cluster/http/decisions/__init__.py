"""Decisions: questions about an input, answered by probabilities instead of text."""
