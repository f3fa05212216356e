"""Wire-compatible with KServe's inference protocol. Their names are in the process's pool of protobuf
types, where another copy (a Triton client's) may stand only in another process."""
