"""What a user can do, one action a module.

The command line and pipelines take names, types and help of their arguments from these functions. A verb therefore
imports torch, Dask and matplotlib when it is called, and not before.
"""
