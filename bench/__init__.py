"""Side-by-side benchmarks: `python -m bench.NAME [--quick]`, both sides in one run, the last line one JSON object."""
