"""The words every room shares: keys, modalities, shards, receipts, ledgers, stores. No network, no torch, no Dagster, no Ray."""
