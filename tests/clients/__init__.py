"""Clients that people have, each at its current release and unchanged, in an environment of their
own (``make clients``). A program for each in ``programs`` says as JSON what it got."""
