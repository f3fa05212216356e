"""Uploaded files, and batches of the requests that they hold."""
