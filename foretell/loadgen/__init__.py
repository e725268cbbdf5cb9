"""`foretell bench serve`: a load generator for any OpenAI-compatible server. Imports neither torch nor the engine."""
