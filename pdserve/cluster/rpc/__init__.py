"""The gRPC front: ``proto/pdserve/v1/inference.proto`` in, calls of the session out, chunks back.

``requests`` turns messages into calls and pieces into chunks and awaits nothing but the tokeniser;
``servicer`` runs the calls; ``server`` opens the port, with health and reflection. Start there.
"""
