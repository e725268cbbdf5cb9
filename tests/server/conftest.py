from tests.server.tiny import tiny

__all__ = ["tiny"]
