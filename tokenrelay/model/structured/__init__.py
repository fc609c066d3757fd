"""Structured output: text that a JSON schema, a regex or a grammar allows, and no other. (by llguidance) No torch.

``grammars`` and ``tool_calls`` write down what a request asks for as one string, ``SamplingParams.grammar``;
``compiler`` makes an automaton of it, ``constraint`` follows one sequence through it, and says which tokens may come
next. Compiling what a stranger sent may take any time, memory or stack: ``sandbox`` tries it in a process of its own.
"""
