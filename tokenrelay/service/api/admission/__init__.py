"""From a valid body to a submission, or to a 4xx before anything is queued.

``admission`` does it, with sampling parameters, grammars and the inputs of embeddings; ``client_terms`` and
``answer_specs`` say how it is to be answered and until when; ``room`` refuses early while the queue is full.
"""
