"""Messages between processes: typed frames over Unix sockets, TCP and TLS.

In: values of ``pdserve.messages`` (or of any other set of dataclasses) and buffers of raw bytes.
Out: the same values and bytes in another process, checked on the way; or a ``WireError``.

Start with ``frame`` (what the bytes look like) and ``codec`` (how a value becomes bytes); then
``connection`` (one peer; ``inbound`` and ``direct`` are its receiving and its sending half),
``listener`` (many), ``postbox`` (one-way traffic that survives a broken connection) and
``blocking`` (the same frames for threads without an event loop).
"""
