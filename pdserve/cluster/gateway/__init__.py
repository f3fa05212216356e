"""What a gateway does between its fronts (``cluster.http``, ``cluster.rpc``) and the router.

``session`` is its middle; around it stand who may ask, what a client's words mean, and what one
request has delivered. Nothing here speaks HTTP or gRPC but ``front``, which starts both servers.
"""
