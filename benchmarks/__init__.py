"""Benchmarks: a module for each kind of program that benchmark.py measures, memory, and the tables of results."""
