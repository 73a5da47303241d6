"""The words every room shares: keys, modalities, shards, receipts, ledgers, stores. No Dagster, no Ray.

torch is in `checkpoint`, `positions`, `precision`, `ranks`, `safe_load` and `streams`, and in a function of `program`;
definitions load none of the six.
"""
