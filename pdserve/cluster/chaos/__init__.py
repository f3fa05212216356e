"""Random faults against a running cluster, under load, with a verdict: ``pdserve chaos``.

``plan`` draws from a seed what happens when; it is pure, and says beforehand what would be done.
``targets`` finds the cluster's processes on this host, ``strikes`` does things to them, ``load``
asks and keeps what it got, ``verdict`` compares that with the same questions without faults, and
with what is still held afterwards. Start reading at ``run``.
"""
