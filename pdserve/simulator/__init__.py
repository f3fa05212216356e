"""Discrete events over the production core of the router.

In: a request trace and a configuration. Out: what the cluster would have done, request by request.
The core takes time as an argument, so nothing here pretends: it only moves the clock, and plays the
gateway and the workers, which answer with the messages that live ones send.

Start reading at ``run``; ``worker`` and ``engine`` are the workers, ``pace`` is why it is fast,
``traces`` and ``transformations`` what goes in, ``report`` and ``page`` what comes out.
"""
