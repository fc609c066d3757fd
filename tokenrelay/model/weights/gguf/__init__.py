"""GGUF files.

From the bytes up: ``header`` (bounded reading), ``metadata`` (all parts of a split file), ``config`` with ``rope`` and
``architectures`` (a network's description), ``rules`` (names and layouts), ``quantized`` (blocks kept in few bits), and
``checkpoint`` (the tensors). Only the last two need torch.
"""
