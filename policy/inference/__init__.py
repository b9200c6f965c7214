"""Sampling compiled into one program, run by one of several back ends, and exported as a model that needs no torch."""
