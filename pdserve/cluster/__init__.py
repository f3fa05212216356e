"""The cluster: everything that knows Ray, and the fronts that clients know.

In: HTTP and gRPC calls, Serve's lifecycle. Out: token streams, and the pools' replicas. Start
reading at ``app.build``, which is the picture; then ``session`` (calls to requests),
``router_service`` and ``worker_shell`` (the processes around the pure cores), ``local`` and ``cli``
(one machine).
"""
