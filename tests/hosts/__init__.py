"""Three hosts on one machine, made of namespaces: own addresses, shared memory and process ids.

In: a configuration and a fault of the network. Out: what clients saw. A ``switch`` process carries
their packets and decides by ``links`` what becomes of each; ``namespaces`` makes and ends hosts;
``cluster`` starts Ray and pdserve on them. The tests need root and ``/dev/net/tun``.
"""
