"""``tokenrelay chat`` and ``complete``: clients in a terminal, which know a server as any client would."""
