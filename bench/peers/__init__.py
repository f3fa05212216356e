"""Scripts that set up and measure other servers. They run in those servers' environments, not in
ours: each stands alone and imports nothing of this project. ``mixed_load`` is a load for any
server, ours included; our benchmarks of whole servers import it. Start with ``README.md``.
"""
