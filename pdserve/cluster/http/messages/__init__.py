"""Anthropic's Messages API, on top of the chat path: a body becomes a chat (``blocks``,
``asking``), a chat's chunks become events and a message (``telling``), and what is wrong is said in
this API's shape (``errors``). Start reading in ``answering``."""
