"""Where records come from: random access to LLaVA JSON(L), ArrayRecord shards and TFDS folders.

A source has `len()` and returns `Record` i in O(1), from any thread. It can be pickled; its files are reopened where it
is unpickled. Pictures are read on request, not with the record.
"""
