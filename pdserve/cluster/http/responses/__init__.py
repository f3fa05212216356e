"""OpenAI's responses API, on top of the chat path: a body becomes a chat (``asking``), a chat's
chunks become events (``telling``), and events are kept so that others find them (``keeping``).
Start reading in ``routes``."""
