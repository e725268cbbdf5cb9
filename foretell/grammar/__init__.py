"""Structured output: forms are compiled to grammars, and grammars say which tokens may come next."""
