"""Continuous batching with all compressor calls of a DeepSeek-V4 model.

Requests arrive, are decoded with drafts of which some are rejected, and finish. With prompts,
chunks of these go through the same calls, some behind a prefix that an earlier request left. A step
is a jitted program with donated caches; with prompts there are two, one of which has room for
chunks. What stands for the rest of the model is random; the records that a step ends in are real,
and compared with float64.

To copy into an engine: ``scheduler`` and the step in ``model``.
"""
