"""KV blocks between workers, hosts and tiers: one store node per host, and its clients.

In: blocks of KV bytes under keys, from any worker. Out: the same bytes, verified, or a reason why
not; and tickets, under which prefill hands a whole request's blocks to decode.

Start with ``keys`` (what a block is called), then ``slots`` (the life of a block's memory),
``tickets``, ``writes`` and ``core`` (who may do what: all decisions, no input or output).
``server`` and ``node`` are the shell around the core, ``arena`` is the shared memory, ``protocol``
the messages, ``client`` what workers use. ``shared_index`` and ``hazards`` are how those on the
node's host find and pin blocks without asking, ``local_reads`` is their side of it, ``lending`` and
``readers`` the node's. ``shares`` and ``eviction`` say what goes when memory is short, ``pins``
what stays; ``operations``, ``admin`` and ``audit`` are for those who run a node. Between hosts:
``pipeline`` (several blocks under way), ``one_sided`` (Mooncake's engine), ``failover``,
``capability`` (who may do what). ``masters`` know which nodes there are, and who has which block;
``ssd`` is the disk below an arena.
"""
