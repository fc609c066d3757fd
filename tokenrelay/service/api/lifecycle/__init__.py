"""A request from its submission to its one end.

``generation`` is one queued request, ``choices`` are those that one answer is made of, ``cursor`` is how far a client
has read them; ``deadline`` ends them, ``timings`` and ``accounting`` tell how it went.
"""
