"""Who knows all nodes of a store: which there are, which has which block, and who leads.

``core`` decides and is pure; ``leading`` is its shell in the master that leads, ``process`` the
process around that; ``mastered`` is a node's part, ``client`` what everybody else uses.
"""
