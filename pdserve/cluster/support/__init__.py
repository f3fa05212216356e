"""``pdserve support-bundle``: one archive with what somebody elsewhere needs to help.

``gathering`` asks each source within its bounds of time and size, ``redacting`` takes out of what
came whatever is secret or said by a client, ``archive`` writes what is left. A source that does not
answer costs its time and a line in the manifest, never the bundle.
"""
