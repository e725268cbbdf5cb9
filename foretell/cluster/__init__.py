"""Instances of a model on many hosts: Ray places them and says which hosts there are, the bytes are our own."""
