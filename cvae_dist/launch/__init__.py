"""The ranks of a training: started here or on a Dask cluster, watched, and started again."""
