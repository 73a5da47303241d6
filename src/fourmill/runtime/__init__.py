"""Where the rooms' plain code meets processes, clusters and launchers: the only place that imports ray."""
