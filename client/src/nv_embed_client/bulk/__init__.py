"""A corpus to vectors in Parquet with Ray (`job`), and from there into LanceDB (`lance`); needs the extra `bulk`."""
