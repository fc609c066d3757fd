"""The API's process: HTTP in, server-sent events out. Stateless, and without torch.

By what one looks for: ``http`` (a connection, a body, an error), ``access`` (who may), ``admission`` (from a body to a
submission), ``lifecycle`` (from there to its end), ``streaming`` (how it is told), ``operations`` (what operators ask).
The protocols are ``openai``, ``responses``, ``anthropic`` and ``ollama``, with bodies in ``schemas`` and described by
``openapi``; ``assistant`` reads what a model has written. The files here wire them together: ``server`` runs ``app``,
whose parts are made in ``process``.
"""
