"""From a list of URLs to pictures: the list as numbered rows, downloads, checks, normalised images, exact duplicates."""
