"""The HTTP front: OpenAI's API in, calls of the session out, JSON or server-sent events back.

In flow: ``bodies`` reads strict JSON, ``schemas`` checks types and refuses what we cannot do,
``gateway.parameters`` checks values, ``generation`` runs the calls while it watches the
client, ``answers`` and ``streaming`` say the result in OpenAI's shapes. Start in ``app``.
"""
