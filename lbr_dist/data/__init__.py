"""Data: `sources` are read as records, `preparation` makes a set of shards of them, `plan` says which sample is in
which step, and the loader brings it. What these share, records and the format of a set above all, lies beside them.
"""
