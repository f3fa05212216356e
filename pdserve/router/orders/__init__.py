"""In which order waiting prompts are begun, and who yields to whom.

``base.Order`` is the seam. ``skip_join`` is ours; the others are what we compare it with, run by
the same core, in the cluster as in the simulator. Start reading at ``base``, then ``skip_join``.
"""
