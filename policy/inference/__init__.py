"""Sampling compiled into one program, behind one name, and written as a model for programs that have no torch."""
