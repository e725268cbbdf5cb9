"""What `foretell bench` does: theory first, then measurement, then one JSON line."""
