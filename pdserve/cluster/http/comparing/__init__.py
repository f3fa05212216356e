"""Texts compared by their vectors: scores of pairs, and documents in the order of a query."""
