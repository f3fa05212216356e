"""Scripts that set up and measure other servers. They run in those servers' environments, not in
ours: each stands alone and imports nothing of this project. Start with ``README.md``.
"""
