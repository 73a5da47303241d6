"""The Dagster assets: what exists, from what, in which blocks. Bodies are thin; the work is in the rooms below."""
