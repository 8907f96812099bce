"""Experiments: what the method was shown to do, rebuilt from data to result, one package for each domain."""
