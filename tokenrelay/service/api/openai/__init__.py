"""OpenAI's routes and the JSON they answer with, and vLLM's ``/tokenize`` and ``/detokenize``.

Each route is a file; its chunks and answers are the ``_format`` beside it. The bodies' schemas, shared with the
protocols that are translated into these, are in ``schemas``.
"""
