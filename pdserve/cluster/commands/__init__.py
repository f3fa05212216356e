"""What the command line does, a file per command; ``cluster.cli`` says which there are.

Nothing else in the cluster imports from here. Commands import lazily what is heavy (Ray, torch),
so that ``pdserve --help`` loads neither.
"""
